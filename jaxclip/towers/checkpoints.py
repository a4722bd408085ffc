"""Checkpoints that survive kills, full disks and rotten files (Orbax)."""

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
"""Item of a checkpoint that holds its metadata as JSON; the name is that of the folder on disk."""
BASE = "base"
"""Under this name a checkpoint of adapters says beside it what they stand on: its name, step and checksum."""
AVERAGE_BEST_BY = f"ema/{BEST_BY}"
CHECKSUMS = {"params": "checksum", "rest": "optimizer_checksum", "ema": "ema_checksum"}
"""Item of a checkpoint -> where the JSON beside it keeps that item's checksum."""


State = Any
"""A named tuple of step, params, optimizer and ema, as `jaxclip.training.state.TrainState`, or of their shapes."""


class CorruptCheckpoint(UserError):
    """A checkpoint's files cannot be read, or hold other values than were written."""


class Checkpoints:
    """The checkpoints of a workdir: written in the background, the newest `keep` and the best one kept.

    A checkpoint holds the training state and a JSON object beside it (progress, fingerprints, checksum of parameters).
    `stored` picks the parameters that it holds.
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
            raise UserError(f"{workdir} has no checkpoints: nothing has been trained there yet")
        policies = [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=_merit, n=1, keep_checkpoints_without_metrics=False),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
            best_fn=_merit,  # without it Orbax writes no metrics, and a restarted run would forget its best checkpoint
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
        with self._explained("open"), _unwarned() if read_only else nullcontext():
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step of the best checkpoint by hit@1, None where none was evaluated.

        Where a moving average is kept, it is that one's hit@1.
        """
        evaluated = {step: _merit(metrics) for step in self.steps() if (metrics := self._manager.metrics(step))}
        return max(evaluated, key=evaluated.__getitem__, default=None)

    def save(self, state: State, metadata: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts writing the state, with `metadata` as JSON; `metrics` ({"hit@1": ...}) make it a candidate for best.

        Returns once the state may be donated; an error of the write before is raised here or by `wait`.

        Raises:
          UserError: the disk is full or not writable, or the parameters are not finite. Checkpoints written before are
            intact.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        items = self._items(state)
        is_finite, sums = jax.device_get(self._examine(items))
        if not is_finite:
            raise UserError(f"parameters are not finite at step {step}, which is not saved; {self._intact()}")
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self.folder} is full: the checkpoint of step {step} needs up to "
                f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; {self._intact()}"
            )
        metadata = {**metadata, **{name: int(value) for name, value in sums.items()}}
        with self._explained(f"write the checkpoint of step {step} to"):
            arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            composite = ocp.args.Composite(**arguments, **{METADATA: ocp.args.JsonSave(metadata)})
            self._manager.save(step, args=composite, metrics=metrics or {})

    def wait(self) -> None:
        """Returns when all that was begun is on disk; UserError where it could not be written."""
        with self._explained("finish a checkpoint in"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: State, step: int) -> tuple[State, dict[str, Any]]:
        """Returns a checkpoint's state, placed as `abstract` says, and the JSON beside it.

        Its parameters are those that are stored.

        Raises:
          UserError: there is no such checkpoint, its arrays are not those of `abstract`, or it is corrupt
            (CorruptCheckpoint).
        """
        restored = self._read(step, **self._items(abstract))
        rest = restored["rest"]
        state = abstract._replace(
            step=rest["step"], params=restored["params"], optimizer=rest["optimizer"], ema=restored.get("ema")
        )
        return state, restored[METADATA]

    def restore_params(self, abstract: Params, step: int, which: str = "") -> Params:
        """Returns a checkpoint's parameters alone; errors as `restore`.

        `which` is "ema" for the moving average, "raw" for what was averaged, "" for the average where there is one.

        Raises:
          UserError: there is no average and "ema" was asked for.
        """
        kept = self.keeps_average(step)
        if which == "ema" and not kept:
            raise UserError(f"{self.folder} has no moving average of step {step}: optimizer.ema was 0 in training")
        params = self._read(step, params=abstract)["params"]
        if which == "raw" or not kept:
            return params
        averaged = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "ema").tree)
        wanted = {path: leaf for path, leaf in flatten_dict(abstract).items() if "/".join(map(str, path)) in averaged}
        return merge_params(self._read(step, ema=unflatten_dict(wanted))["ema"], params)

    def keeps_average(self, step: int) -> bool:
        """Returns whether a checkpoint holds a moving average of its parameters."""
        return (self.folder / str(step) / "ema").exists()

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the JSON beside a checkpoint's state; errors as `restore`."""
        return self._read(step)[METADATA]

    def restore_latest(self, abstract: State, say: Callable[[str], None]) -> tuple[State, dict[str, Any]] | None:
        """Returns the newest checkpoint that is whole, None where there is none at all.

        A corrupt one is said, moved to checkpoints.corrupt/ and passed over. Where several processes read it, one may
        find corrupt what the others could read: then the run ends, and started again it finds the one before.

        Raises:
          UserError: there are checkpoints, and all of them are corrupt; or the newest whole one has other arrays than
            `abstract`.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.restore(abstract, step)
            except CorruptCheckpoint as error:
                aside = self.folder.parent / CORRUPT / str(step)
                aside.parent.mkdir(exist_ok=True)
                if jax.process_count() > 1:
                    with suppress(FileNotFoundError, FileExistsError):  # another process was first
                        (self.folder / str(step)).rename(aside)
                    raise UserError(f"{error}; moved to {aside}: start again, from the one before") from error
                shutil.rmtree(aside, ignore_errors=True)
                shutil.move(self.folder / str(step), aside)
                self._manager.reload()
                say(f"{error}; moved to {aside}, falling back to the one before")
        if steps:
            raise UserError(
                f"all checkpoints of {self.folder} were corrupt; they are in {self.folder.parent / CORRUPT}"
            )
        return None

    def _read(self, step: int, **items: Any) -> dict[str, Any]:
        if step not in self._manager.all_steps():
            raise UserError(f"{self.folder} has no checkpoint of step {step}; it has {self.steps()}")
        folder = self.folder / str(step)
        arguments = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        _hide_abandoned_reads()
        try:
            differing = [line for name, item in items.items() for line in _differences(folder / name, item)]
            if not differing:
                composite = ocp.args.Composite(**arguments, **{METADATA: ocp.args.JsonRestore()})
                restored = self._manager.restore(step, args=composite)
                metadata = restored[METADATA]
                sums = {name: metadata.get(CHECKSUMS[name]) for name in items} | {"params": metadata["checksum"]}
        except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many types, bare Exception among them
            raise CorruptCheckpoint(f"the checkpoint {folder} is corrupt: {_named(error)}") from error
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"the parameters of {folder} do not match the configuration: {', '.join(differing[:3])}{more}; "
                "take the configuration it was trained with or another --workdir"
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

    def _intact(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was saved yet"

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"could not {what} {self.folder}: {_named(error)}") from error


def resolve_step(which: str, checkpoints: Checkpoints) -> int:
    """Returns the step that --step names: "latest", "best" or a number; UserError where there is none."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} has no complete checkpoint")
    if which == "latest":
        return steps[-1]
    if which == "best":
        return checkpoints.best() or steps[-1]
    if not which.isdigit() or int(which) not in steps:
        raise UserError(f"--step={which} is none of latest, best, {', '.join(map(str, steps))}")
    return int(which)


def _merit(metrics: dict[str, float]) -> float:
    return metrics.get(AVERAGE_BEST_BY, metrics.get(BEST_BY, -math.inf))


@cache
def _hide_abandoned_reads() -> None:
    """Hides what the reads print that Orbax abandons once one has failed.

    A warning or traceback each, at any later time: when the coroutine is collected, when the task of one that failed as
    well is, or when TensorStore, in a thread of its own, reports to an event loop that is closed by then.
    """
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        read = inspect.iscoroutine(unraisable.object) and unraisable.object.__name__.startswith("_read_array")
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not (read or late):
            shown(unraisable)

    def is_other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "exception was never retrieved" not in message or f"/{FOLDER}/" not in message

    sys.unraisablehook = show
    logging.getLogger("asyncio").addFilter(is_other)
    warnings.filterwarnings("ignore", message="coroutine '_read_array.*' was never awaited", category=RuntimeWarning)


def _differences(item: Path, abstract: Any) -> list[str]:
    """Returns a line for each array whose shape in an item of a checkpoint is not that of `abstract`."""
    stored, wanted = _shapes(ocp.PyTreeCheckpointHandler().metadata(item).tree), _shapes(abstract)
    return [
        f"{name} is {stored.get(name, 'missing')}, not {wanted.get(name, 'there')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns each array's shape by its name; a named tuple and the dict it is stored as have the same names."""
    return dict(zip(jax.tree.leaves(names(tree)), (tuple(leaf.shape) for leaf in jax.tree.leaves(tree)), strict=True))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:300]}"


@contextmanager
def _unwarned() -> Iterator[None]:
    """Leaves out what Orbax warns of whenever it opens a folder only to read, as it is told to."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
