"""Orbax checkpoints with checksums: an interrupted write, a full disk or a corrupt file never harms an earlier one."""

import inspect
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from jaxclip.errors import UserError, first_line
from jaxclip.towers.params import Params, checksum, finite, merge_params
from jaxclip.towers.sharding import names

FOLDER = "checkpoints"
CORRUPT = "checkpoints.corrupt"
BEST_BY = "hit@1"
METADATA = "beside"
"""Name, on disk, of the checkpoint item that holds the metadata as JSON."""
BASE = "base"
"""Metadata key of a checkpoint of adapters; its value has the name, step and checksum of the base."""
AVERAGE_BEST_BY = f"ema/{BEST_BY}"
CHECKSUMS = {"params": "checksum", "rest": "optimizer_checksum", "ema": "ema_checksum"}
"""Checkpoint item -> metadata key of that item's checksum."""


State = Any
"""A named tuple with step, params, optimizer and ema (`jaxclip.training.state.TrainState`): arrays or their shapes."""


class CorruptCheckpoint(UserError):
    """A checkpoint's files cannot be read, or their values are not the ones that were written."""


class Checkpoints:
    """The checkpoints of a workdir: written in the background; the newest `keep` and the best one are kept.

    The best one has the highest hit@1 (see `best`). A checkpoint holds the training state and metadata as JSON
    (progress, fingerprints, checksums). `stored` maps all parameters to those that are saved.

    Attributes:
      folder: the folder of the checkpoints, one subfolder per step.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        keep: int = 1,
        read_only: bool = False,
        stored: Callable[[Params], Params] = lambda params: params,
    ):
        self.folder = (workdir / FOLDER).resolve()
        if read_only and not self.folder.exists():
            raise UserError(f"{workdir} has no checkpoints: give the workdir of a run that has been trained")
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=_merit, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
            best_fn=_merit,  # without it Orbax saves no metrics, and a resumed run would not know its best checkpoint
            enable_async_checkpointing=True,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._stored = stored
        self._checksum = jax.jit(checksum)
        self._examine = jax.jit(
            lambda items: (finite(items["params"]), {CHECKSUMS[name]: checksum(item) for name, item in items.items()})
        )
        with self._io_errors("open"), _absl_warnings_hidden() if read_only else nullcontext():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step of the kept checkpoint with the highest hit@1, or None if none was evaluated.

        The hit@1 is text-to-image, and that of the moving average if there is one.
        """
        evaluated = {step: _merit(metrics) for step in self.steps() if (metrics := self._manager.metrics(step))}
        return max(evaluated, key=evaluated.__getitem__, default=None)

    def save(self, state: State, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts to write a checkpoint in the background; returns as soon as the state's buffers may be donated.

        It first waits for the previous checkpoint. It does nothing if the step already has a checkpoint.

        Args:
          state: the training state.
          metadata: values that JSON can hold; the checksums are added to them.
          metrics: saved if "hit@1" or "ema/hit@1" is among them; the checkpoint may then become the best one.

        Raises:
          UserError: the disk is full or not writable, or the parameters are not finite; or the previous write failed.
            Earlier checkpoints stay intact.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        items = self._items(state)
        is_finite, sums = jax.device_get(self._examine(items))
        if not is_finite:
            raise UserError(
                f"parameters are not finite at step {step}, which is not saved; {self._newest_intact()}; "
                "a lower optimizer.learning_rate may help"
            )
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self.folder} is full: the checkpoint of step {step} needs up to "
                f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free: free some space and start again; "
                f"{self._newest_intact()}"
            )
        metadata = {**metadata, **{name: int(value) for name, value in sums.items()}}
        with self._io_errors(f"write the checkpoint of step {step} to"):
            arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            composite = ocp.args.Composite(**arguments, **{METADATA: ocp.args.JsonSave(metadata)})
            self._manager.save(step, args=composite, metrics=metrics if _merit(metrics or {}) > -math.inf else {})

    def wait(self) -> None:
        """Waits until every started checkpoint is on disk; UserError if one could not be written."""
        with self._io_errors("finish a checkpoint in"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: State, step: int) -> tuple[State, dict[str, Any]]:
        """Returns a checkpoint's state, sharded as `abstract`, and its metadata.

        The state's parameters are only those that checkpoints store (see the class).

        Raises:
          CorruptCheckpoint: a file cannot be read, or a checksum is wrong.
          UserError: there is no such checkpoint, or its arrays differ from `abstract` in name or shape.
        """
        restored = self._read(step, **self._items(abstract))
        rest = restored["rest"]
        state = abstract._replace(
            step=rest["step"], params=restored["params"], optimizer=rest["optimizer"], ema=restored.get("ema")
        )
        return state, restored[METADATA]

    def restore_params(self, abstract: Params, step: int, parameters: str = "") -> Params:
        """Returns only the parameters of a checkpoint, sharded as `abstract`.

        `parameters` is "raw" for the values at that step, "ema" for their moving average (frozen parameters, which have
        none, keep their values), or "" for "ema" if the checkpoint has a moving average and else "raw".

        Raises:
          UserError: as `restore`, or `parameters` is "ema" and the checkpoint has no moving average.
        """
        has_average = self.keeps_average(step)
        if parameters == "ema" and not has_average:
            raise UserError(f"{self.folder} has no moving average of step {step} (optimizer.ema=0): omit --parameters")
        params = self._read(step, params=abstract)["params"]
        if parameters == "raw" or not has_average:
            return params
        averaged = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "ema").tree)
        ema = {path: leaf for path, leaf in flatten_dict(abstract).items() if "/".join(map(str, path)) in averaged}
        return merge_params(self._read(step, ema=unflatten_dict(ema))["ema"], params)

    def keeps_average(self, step: int) -> bool:
        """Returns whether a checkpoint holds a moving average of its parameters."""
        return (self.folder / str(step) / "ema").exists()

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns a checkpoint's metadata; raises what `restore` raises."""
        return self._read(step)[METADATA]

    def restore_latest(self, abstract: State, say: Callable[[str], None]) -> tuple[State, dict[str, Any]] | None:
        """Returns the state and metadata of the newest intact checkpoint, or None if there are no checkpoints.

        A corrupt checkpoint is reported through `say` and moved to checkpoints.corrupt/, and the previous one is tried.
        If several processes read checkpoints, one may fail to read what the others could: the run then ends with an
        error, and resumes from the previous checkpoint when it is started again.

        Raises:
          UserError: all checkpoints are corrupt; or the arrays of the newest intact one are not those of `abstract`.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(abstract, step)
            except CorruptCheckpoint as error:
                aside = self.folder.parent / CORRUPT / str(step)
                aside.parent.mkdir(exist_ok=True)
                if jax.process_count() > 1:
                    with suppress(FileNotFoundError, FileExistsError):  # another process has moved it
                        (self.folder / str(step)).rename(aside)
                    message = f"{error}; moved to {aside}: start again to resume from the previous one"
                    raise UserError(message) from error
                shutil.rmtree(aside, ignore_errors=True)
                shutil.move(self.folder / str(step), aside)
                self._manager.reload()
                say(f"{error}; moved to {aside}, falling back to the previous one")
        if steps:
            raise UserError(
                f"all checkpoints of {self.folder} were corrupt and were moved to {self.folder.parent / CORRUPT}: "
                "restore a backup of one, or start again to train from the beginning"
            )
        return None

    def _read(self, step: int, **items: Any) -> dict[str, Any]:
        if step not in self._manager.all_steps():
            raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {self.steps()}")
        folder = self.folder / str(step)
        arguments = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        _silence_abandoned_reads()
        try:
            differing = [line for name, item in items.items() for line in _differences(folder / name, item)]
            if not differing:
                composite = ocp.args.Composite(**arguments, **{METADATA: ocp.args.JsonRestore()})
                restored = self._manager.restore(step, args=composite)
                metadata = restored[METADATA]
                sums = {name: metadata.get(CHECKSUMS[name]) for name in items} | {"params": metadata["checksum"]}
        except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises many types, even Exception itself
            raise CorruptCheckpoint(f"the checkpoint {folder} is corrupt: {_type_and_message(error)}") from error
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"the arrays of {folder} do not match the configuration: {', '.join(differing[:3])}{more}; "
                "use the configuration that the checkpoint was trained with, or another --workdir"
            )
        for name in items:
            expected = sums[name]
            if expected is not None and int(self._checksum(restored[name])) != expected:
                raise CorruptCheckpoint(f"the checkpoint {folder} is corrupt: the checksum of its {name} is wrong")
        return restored

    def close(self) -> None:
        self._manager.close()

    def _items(self, state: State) -> dict[str, Any]:
        rest = {"step": state.step, "optimizer": state.optimizer}
        ema = {} if state.ema is None else {"ema": state.ema}
        return {"params": self._stored(state.params), "rest": rest, **ema}

    def _newest_intact(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was saved yet"

    @contextmanager
    def _io_errors(self, action: str) -> Iterator[None]:
        """Raises an error of the file system or of Orbax as a UserError that names the action and the folder."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"could not {action} {self.folder}: {_type_and_message(error)}") from error


def resolve_step(step: str, checkpoints: Checkpoints) -> int:
    """Returns the step, as an integer, of the checkpoint that `step` ("latest", "best" or a number) names.

    Raises:
      UserError: there is no such checkpoint, or "best" is asked for and none was evaluated on a validation split.
    """
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} has no complete checkpoint: give the workdir of a run that has one")
    if step == "latest":
        return steps[-1]
    if step == "best":
        if (best := checkpoints.best()) is None:
            raise UserError(
                f"--step=best: no checkpoint of {checkpoints.folder} was evaluated on a validation split: train with "
                f"data.validation and evaluation.every, or give latest or one of {', '.join(map(str, steps))}"
            )
        return best
    if not step.isdigit() or int(step) not in steps:
        raise UserError(f"--step={step} is not one of latest, best, {', '.join(map(str, steps))}")
    return int(step)


def _merit(metrics: dict[str, float]) -> float:
    return metrics.get(AVERAGE_BEST_BY, metrics.get(BEST_BY, -math.inf))


@cache
def _silence_abandoned_reads() -> None:
    """Hides the warnings and tracebacks of the reads that Orbax abandons after one of them has failed.

    Each such read may print one at any later time: when its coroutine or its failed task is garbage-collected, or
    when a thread of TensorStore reports to an event loop that has been closed.
    """
    previous_hook = sys.unraisablehook

    def show(unraisable: Any) -> None:
        read = inspect.iscoroutine(unraisable.object) and unraisable.object.__name__.startswith("_read_array")
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not (read or late):
            previous_hook(unraisable)

    def not_abandoned(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "exception was never retrieved" not in message or f"/{FOLDER}/" not in message

    sys.unraisablehook = show
    logging.getLogger("asyncio").addFilter(not_abandoned)
    warnings.filterwarnings("ignore", message="coroutine '_read_array.*' was never awaited", category=RuntimeWarning)


def _differences(item: Path, abstract: Any) -> list[str]:
    """Returns a line for each array that only a checkpoint's item or only `abstract` holds, or whose shapes differ."""
    stored, expected = _shapes(ocp.PyTreeCheckpointHandler().metadata(item).tree), _shapes(abstract)
    return [
        f"{name} is {stored.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(stored.keys() | expected.keys())
        if stored.get(name) != expected.get(name)
    ]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the arrays; a named tuple and the dict that Orbax stores it as have the same names."""
    return dict(zip(jax.tree.leaves(names(tree)), (tuple(leaf.shape) for leaf in jax.tree.leaves(tree)), strict=True))


def _type_and_message(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:300]}"


@contextmanager
def _absl_warnings_hidden() -> Iterator[None]:
    """Hides absl's warnings; Orbax logs some every time that a folder is opened with read_only=True."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
