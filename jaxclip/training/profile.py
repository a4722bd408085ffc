"""A trace of some steps, as TensorBoard and Perfetto open it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxclip.errors import UserError
from jaxclip.runtime import distributed

trace_section = jax.profiler.TraceAnnotation
"""Names a part of the loop in the trace: `with trace_section("save"): ...`; nearly free when no trace is taken."""


def parse_steps(text: str) -> range:
    """Returns the steps of "a:b", a to b inclusive; UserError where it is nothing like it."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--profile_steps={text} must be FIRST:LAST, as 10:12, steps counting from 1")
    return range(int(found[1]), int(found[2]) + 1)


class Profile:
    """Traces steps into `folder`/plugins/profile/TIME/; of several processes the first, its own devices."""

    def __init__(self, folder: Path, steps: range = range(0)):
        self._folder, self._steps = folder, steps if distributed.is_primary() else range(0)
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates one step, and begins the trace before the first one that is asked for."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, results: Any) -> None:
        """Ends the trace after the last step that is asked for, once its results are there."""
        if self._tracing and number + 1 not in self._steps:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
