"""The training loop: restore, then for each step: batch, step, write, maybe evaluate, maybe save."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.pipeline.prefetch import prefetch
from jaxclip.runtime import distributed
from jaxclip.runtime.metrics_log import Silent, Writers
from jaxclip.runtime.progress import Progress
from jaxclip.towers.checkpoints import Checkpoints
from jaxclip.towers.state import TrainState
from jaxclip.training.profile import Profile, trace_section
from jaxclip.training.step import Batch, Metrics
from jaxclip.training.stopping import stop_on_signals

Evaluate = Callable[[TrainState], dict[str, float]]


@dataclass(frozen=True)
class Cadence:
    """After how many steps what happens, and always after the last one; `evaluate` = 0: only then."""

    steps: int
    log: int
    evaluate: int
    save: int


def run(
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    place: Callable[[Any], Batch],
    *,
    cadence: Cadence,
    progress: Progress,
    writers: Writers | Silent,
    checkpoints: Checkpoints,
    beside: dict[str, Any],
    evaluate: Evaluate,
    profile: Profile,
) -> tuple[TrainState, int | None]:
    """Trains from the state's step to the last one; returns the final state and the signal that ended it early, if any.

    One step runs while the metrics of the one before are read, so that the devices never wait for the host; what is
    saved has been checked to be finite.

    Raises:
      UserError: the loss or a gradient is not finite, naming the step, with the last good checkpoint kept; or a
        checkpoint cannot be written.
    """
    first = number = int(state.step)
    previous: Metrics | None = None

    def save(metrics: dict[str, float] | None = None) -> None:
        checkpoints.save(state, {**beside, "progress": progress.to_json()}, metrics)

    placed = prefetch(batches, place)
    with stop_on_signals() as stop:
        for number in range(first + 1, cadence.steps + 1):
            with profile.step(number):
                waiting = time.perf_counter()
                with trace_section("wait for data"):
                    batch = next(placed)
                progress.waited(time.perf_counter() - waiting)
                state, metrics = step(state, batch)
            if previous is not None:
                _check_finite(previous, number - 1, checkpoints)
            previous = metrics
            last = number == cadence.steps
            logs = number % cadence.log == 0 or last
            evaluates = last or (cadence.evaluate and number % cadence.evaluate == 0)
            stops = stop.after(number)
            saves = evaluates or stops or number % cadence.save == 0
            if logs or saves:
                _check_finite(metrics, number, checkpoints)
            progress.advance()
            if logs:
                _write(number, metrics, progress, writers)
            if saves:
                progress.pause()
                with trace_section("evaluate"):
                    found = evaluate(state) if evaluates and (last or not stops) else None
                if found:
                    writers.write(number, found)
                with trace_section("save"):
                    save(found)
                progress.resume()
            profile.after(number, metrics)
            if stops:
                break
        placed.close()
        checkpoints.wait()
    return state, stop.signal if number < cadence.steps else None


def train(
    config: Config,
    workdir: Path,
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Any],
    place: Callable[[Any], Batch],
    *,
    steps: int,
    flops: float,
    checkpoints: Checkpoints,
    beside: dict[str, Any],
    evaluate: Evaluate,
    profiled: range,
) -> tuple[TrainState, int | None]:
    """Returns what `run` does, in the configured cadence; what it tells goes to the console and into the workdir.

    Args:
      steps: of the whole run. flops: of one step, per device. profiled: the steps to trace.
    """
    first = int(state.step)
    written = Writers(workdir, first=first) if distributed.is_primary() else Silent()
    saved = beside.get("progress", {})
    progress = Progress(first=first, steps=steps, batch_size=config.batch_size, flops=flops, saved=saved)
    profile = Profile(workdir / "tensorboard", profiled)
    try:
        return run(
            state,
            step,
            batches,
            place,
            cadence=Cadence(steps, config.log_every, config.evaluation.every, config.checkpoint.every),
            progress=progress,
            writers=written,
            checkpoints=checkpoints,
            beside=beside,
            evaluate=evaluate,
            profile=profile,
        )
    finally:
        profile.close()
        progress.close()
        written.close()


def _check_finite(metrics: Metrics, number: int, checkpoints: Checkpoints) -> None:
    if float(metrics["finite"]) == 1.0:
        return
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"the checkpoint of step {steps[-1]} is the last good one" if steps else "no checkpoint was saved before"
    raise UserError(
        f"loss {float(metrics['loss'])} and gradient norm {float(metrics['gradient_norm'])} at step {number} are not "
        f"finite; {kept}. A lower optimizer.learning_rate or a longer optimizer.warmup_steps is the usual remedy"
    )


def _write(number: int, metrics: Metrics, progress: Progress, writers: Writers) -> None:
    values = {name: float(value) for name, value in metrics.items() if name != "finite"}
    measures = progress.measures()
    writers.write(number, {**values, **measures})
    shown = {"loss": f"{values['loss']:.3f}", "pairs/s": f"{measures['pairs_per_second']:,.0f}"}
    if "mfu" in measures:
        shown["mfu"] = f"{measures['mfu']:.0%}"
    progress.show(**shown, wait=f"{measures['data_wait']:.1%}")
