"""Progress of a run: percent, ETA, throughput, share of time waiting for data, MFU, device-hours."""

import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm

from jaxclip.runtime import distributed


def bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """Returns a progress bar with ETA, redrawn at most every 0.2 seconds, or every 15 if stderr is no terminal.

    Only the first of several processes shows it. The arguments are those of `tqdm`.
    """
    terminal = sys.stderr.isatty()
    defaults = {"dynamic_ncols": True, "mininterval": 0.2 if terminal else 15.0, "leave": True}
    return tqdm(iterable, disable=not distributed.is_primary(), **{**defaults, **options})


class Progress:
    """Counts the steps and seconds of training, without the time of evaluations and saves.

    Args:
      start: the step from which training starts or resumes.
      steps: the number of the last step.
      batch_size: pairs per step, over all devices.
      model_seconds: seconds of one step's model FLOPs at the devices' peak, for the MFU; None if it is unknown.
      saved: `to_json` from the checkpoint of a resumed run, whose seconds are continued; else {}.
    """

    def __init__(self, *, start: int, steps: int, batch_size: int, model_seconds: float | None, saved: dict[str, Any]):
        self.batch_size, self.model_seconds = batch_size, model_seconds
        self.trained_seconds = float(saved.get("trained_seconds", 0.0))
        self._bar = bar(total=steps, initial=start, desc="training", unit="step", smoothing=0.05)
        self._since = self._mark = time.perf_counter()
        self._steps = 0
        self._waited = 0.0

    def add_wait(self, seconds: float) -> None:
        """Adds the seconds that the loop waited for a batch."""
        self._waited += seconds

    def advance(self) -> None:
        """Counts one step, and adds the time since the previous one, without pauses, to the seconds of training."""
        now = time.perf_counter()
        self.trained_seconds += now - self._mark
        self._mark = now
        self._steps += 1
        self._bar.update(1)

    def pause(self) -> None:
        """Stops the clock, before an evaluation or a save."""
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Starts the clock again."""
        pause = time.perf_counter() - self._paused
        self._mark += pause
        self._since += pause

    def measures(self) -> dict[str, float]:
        """Returns pairs_per_second, step_seconds, data_wait and mfu since the last call, and device_hours of the run.

        pairs_per_second counts the pairs of all devices. data_wait is the share of time spent waiting for batches. mfu
        is `model_seconds` as a share of step_seconds; it is left out if `model_seconds` is unknown.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        steps = max(self._steps, 1)
        measures = {
            "pairs_per_second": self.batch_size * self._steps / elapsed,
            "step_seconds": elapsed / steps,
            "data_wait": min(1.0, self._waited / elapsed),
            "device_hours": self.trained_seconds * jax.device_count() / 3600,
        }
        if self.model_seconds is not None:
            measures["mfu"] = self.model_seconds / measures["step_seconds"]
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        return measures

    def show(self, **figures: Any) -> None:
        """Shows values after the bar, from its next redraw on."""
        self._bar.set_postfix(figures, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def to_json(self) -> dict[str, float]:
        """Returns the seconds of training so far, for `saved` of a resumed run."""
        return {"trained_seconds": round(self.trained_seconds, 3)}

    def close(self) -> None:
        self._bar.close()
