"""The training loop of towers and re-rankers: each step may be followed by logging, an evaluation and a checkpoint."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxclip.errors import UserError
from jaxclip.pipeline.prefetch import prefetch
from jaxclip.runtime import distributed
from jaxclip.runtime.metrics_log import MetricsLog, NoMetricsLog
from jaxclip.runtime.progress import Progress
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.training.profile import Profile, trace_section
from jaxclip.training.state import TrainState
from jaxclip.training.step import Batch, Metrics
from jaxclip.training.stopping import stop_on_signals


@dataclass(frozen=True)
class Cadence:
    """When to log, evaluate and save, in steps; all three also happen after the last step.

    A checkpoint is also saved after each evaluation, and when a signal stops the run.

    Attributes:
      steps: length of the whole run.
      log: steps between two log entries.
      evaluate: steps between two evaluations; 0 = only after the last step.
      save: steps between two checkpoints.
    """

    steps: int
    log: int
    evaluate: int
    save: int


@dataclass(frozen=True)
class Run:
    """Everything that the training loop needs, for towers or a re-ranker.

    Attributes:
      workdir: the metrics log and the trace are written here.
      state: training state to begin or resume from; the first step donates its arrays.
      step: compiled function (state, batch) -> (state, metrics).
      batches: host batches, one for each step after `state.step`.
      place: puts a host batch on the devices.
      batch_size: pairs (towers) or lists (re-ranker) per step, over all devices.
      model_seconds: seconds of one step's model FLOPs at the devices' peak; None if the peak is unknown.
      cadence: when to log, evaluate and save.
      checkpoints: checkpoints of the workdir.
      metadata: saved with each state, together with `Progress.to_json`.
      evaluate: function state -> metrics of the evaluated split, by name.
      profiled: the steps to trace.
    """

    workdir: Path
    state: TrainState
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    batches: Iterator[Any]
    place: Callable[[Any], Batch]
    batch_size: int
    model_seconds: float | None
    cadence: Cadence
    checkpoints: Checkpoints
    metadata: dict[str, Any]
    evaluate: Callable[[TrainState], dict[str, float]]
    profiled: range = range(0)


def train(run: Run) -> tuple[TrainState, int | None]:
    """Trains to the last step or until a signal; returns the final state, and the signal if it ended the run early.

    The metrics of a step are read after the next step has been started, so that the devices do not wait for the host.
    Steps that are logged, evaluated or saved are the exception. A state is saved only if the loss and gradients of its
    step are finite.

    Raises:
      UserError: the loss or a gradient is not finite (the error names the step and the last good checkpoint), or a
        checkpoint cannot be written.
    """
    start = int(run.state.step)
    log = MetricsLog(run.workdir, start=start) if distributed.is_primary() else NoMetricsLog()
    saved = run.metadata.get("progress", {})
    progress = Progress(
        start=start, steps=run.cadence.steps, batch_size=run.batch_size, model_seconds=run.model_seconds, saved=saved
    )
    profile = Profile(run.workdir / "tensorboard", run.profiled)
    try:
        return _run_steps(run, progress, log, profile)
    finally:
        profile.close()
        progress.close()
        log.close()


def _run_steps(
    run: Run, progress: Progress, log: MetricsLog | NoMetricsLog, profile: Profile
) -> tuple[TrainState, int | None]:
    state, cadence, checkpoints = run.state, run.cadence, run.checkpoints
    start = number = int(state.step)
    previous: Metrics | None = None
    batches = prefetch(run.batches, run.place)
    with stop_on_signals() as stop:
        for number in range(start + 1, cadence.steps + 1):
            with profile.step(number):
                wait_start = time.perf_counter()
                with trace_section("wait for data"):
                    batch = next(batches)
                progress.add_wait(time.perf_counter() - wait_start)
                state, metrics = run.step(state, batch)
            if previous is not None:
                _check_finite(previous, number - 1, checkpoints)
            previous = metrics
            is_last = number == cadence.steps
            should_log = is_last or number % cadence.log == 0
            should_evaluate = is_last or (cadence.evaluate and number % cadence.evaluate == 0)
            should_stop = stop.after(number)
            should_save = should_evaluate or should_stop or number % cadence.save == 0
            if should_log or should_save:
                _check_finite(metrics, number, checkpoints)
            progress.advance()
            if should_log:
                _log(number, metrics, progress, log)
            if should_save:
                progress.pause()
                with trace_section("evaluate"):
                    evaluated = run.evaluate(state) if should_evaluate and (is_last or not should_stop) else None
                if evaluated:
                    log.write(number, evaluated)
                with trace_section("save"):
                    checkpoints.save(state, {**run.metadata, "progress": progress.to_json()}, evaluated)
                progress.resume()
            profile.after(number, metrics)
            if should_stop:
                break
        batches.close()
        checkpoints.wait()
    return state, stop.signal if number < cadence.steps else None


def _check_finite(metrics: Metrics, number: int, checkpoints: Checkpoints) -> None:
    if float(metrics["finite"]) == 1.0:
        return
    checkpoints.wait()
    steps = checkpoints.steps()
    remains = f"the checkpoint of step {steps[-1]} is the last good one" if steps else "no checkpoint was saved before"
    raise UserError(
        f"loss {float(metrics['loss'])} and gradient norm {float(metrics['gradient_norm'])} at step {number} are not "
        f"finite; {remains}. A lower optimizer.learning_rate or more optimizer.warmup_steps may help"
    )


def _log(number: int, metrics: Metrics, progress: Progress, log: MetricsLog | NoMetricsLog) -> None:
    values = {name: float(value) for name, value in metrics.items() if name != "finite"}
    measures = progress.measures()
    log.write(number, {**values, **measures})
    shown = {"loss": f"{values['loss']:.3f}", "pairs/s": f"{measures['pairs_per_second']:,.0f}"}
    if "mfu" in measures:
        shown["mfu"] = f"{measures['mfu']:.0%}"
    progress.show(**shown, wait=f"{measures['data_wait']:.1%}")
