"""Traces of training steps for TensorBoard and Perfetto."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxclip.errors import UserError
from jaxclip.runtime import distributed

trace_section = jax.profiler.TraceAnnotation
"""Names a section of the loop in the trace: `with trace_section("save"): ...`. Without a trace it records nothing."""


def parse_steps(text: str) -> range:
    """Returns the steps of "FIRST:LAST", both included; raises a UserError for any other text."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--profile_steps={text} must be FIRST:LAST, such as 10:12, where steps count from 1")
    return range(int(match[1]), int(match[2]) + 1)


class Profile:
    """Writes traces of steps to `folder`/plugins/profile/TIME/; only process 0 traces, and only its own devices."""

    def __init__(self, folder: Path, steps: range = range(0)):
        self._folder, self._steps = folder, steps if distributed.is_primary() else range(0)
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates one step, and starts the trace before the first requested step."""
        if number in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, results: Any) -> None:
        """Ends the trace after the last requested step, once its results are computed."""
        if self._tracing and number + 1 not in self._steps:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
