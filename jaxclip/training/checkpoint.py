"""Checkpoints that survive kills, full disks and rotten files (Orbax)."""

import inspect
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxclip.errors import UserError
from jaxclip.training.mesh import names
from jaxclip.training.state import Params, TrainState, checksum, finite

FOLDER = "checkpoints"
CORRUPT = "checkpoints.corrupt"
BEST_BY = "hit@1"
CHECKSUMS = {"params": "checksum", "rest": "optimizer_checksum"}
"""Item of a checkpoint -> where the JSON beside it keeps that item's checksum."""


class CorruptCheckpoint(UserError):
    """A checkpoint's files cannot be read, or hold other values than were written."""


class Checkpoints:
    """The checkpoints of a workdir: written in the background, the newest `keep` and the best one kept.

    A checkpoint holds the training state and a JSON object beside it (progress, fingerprints, checksum of parameters).
    """

    def __init__(self, workdir: Path, *, keep: int = 1, read_only: bool = False):
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
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._checksum = jax.jit(checksum)
        self._examine = jax.jit(lambda params, rest: (finite(params), checksum(params), checksum(rest)))
        with self._explained("open"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Returns the steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step of the best checkpoint by hit@1, None where none was evaluated."""
        evaluated = {step: metrics[BEST_BY] for step in self.steps() if (metrics := self._manager.metrics(step))}
        return max(evaluated, key=evaluated.__getitem__, default=None)

    def save(self, state: TrainState, beside: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts writing the state, with `beside` as JSON; `metrics` ({"hit@1": ...}) make it a candidate for best.

        Returns once the state may be donated; an error of the write before is raised here or by `wait`.

        Raises:
          UserError: the disk is full or not writable, or the parameters are not finite. Checkpoints written before are
            intact.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()
        rest = {"step": state.step, "optimizer": state.optimizer}
        is_finite, *sums = map(int, self._examine(state.params, rest))
        if not is_finite:
            raise UserError(f"parameters are not finite at step {step}, which is not saved; {self._intact()}")
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"the disk of {self.folder} is full: the checkpoint of step {step} needs up to "
                f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; {self._intact()}"
            )
        beside = {**beside, **dict(zip(CHECKSUMS.values(), sums, strict=True))}
        with self._explained(f"write the checkpoint of step {step} to"):
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave(rest),
                beside=ocp.args.JsonSave(beside),
            )
            self._manager.save(step, args=items, metrics=metrics or {})

    def wait(self) -> None:
        """Returns when all that was begun is on disk; UserError where it could not be written."""
        with self._explained("finish a checkpoint in"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Returns a checkpoint's state, placed as `abstract` says, and the JSON beside it.

        Raises:
          UserError: there is no such checkpoint, its arrays are not those of `abstract`, or it is corrupt
            (CorruptCheckpoint).
        """
        rest = {"step": abstract.step, "optimizer": abstract.optimizer}
        restored = self._read(step, params=abstract.params, rest=rest)
        return TrainState(params=restored["params"], **restored["rest"]), restored["beside"]

    def restore_params(self, abstract: Params, step: int) -> Params:
        """Returns a checkpoint's parameters alone; errors as `restore`."""
        return self._read(step, params=abstract)["params"]

    def beside(self, step: int) -> dict[str, Any]:
        """Returns the JSON beside a checkpoint's state."""
        with self._explained(f"read the checkpoint of step {step} in"):
            return self._manager.restore(step, args=ocp.args.Composite(beside=ocp.args.JsonRestore()))["beside"]

    def restore_latest(
        self, abstract: TrainState, say: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest checkpoint that is whole, None where there is none at all.

        A corrupt one is said, moved to checkpoints.corrupt/ and passed over.

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
                composite = ocp.args.Composite(**arguments, beside=ocp.args.JsonRestore())
                restored = self._manager.restore(step, args=composite)
                beside = restored["beside"]
                sums = {name: beside.get(CHECKSUMS[name]) for name in items} | {"params": beside["checksum"]}
        except (PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # of many types, bare Exception among them
            raise CorruptCheckpoint(f"the checkpoint {folder} is corrupt: {_first_line(error)}") from error
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"the parameters of {folder} do not match the configuration: {', '.join(differing[:3])}{more}; "
                "take the configuration it was trained with or another --workdir"
            )
        for name, expected in sums.items():
            if expected is not None and int(self._checksum(restored[name])) != expected:
                raise CorruptCheckpoint(f"the checkpoint {folder} is corrupt: the checksum of its {name} is wrong")
        return restored

    def close(self) -> None:
        self._manager.close()

    def _intact(self) -> str:
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is intact" if steps else "nothing was saved yet"

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"could not {what} {self.folder}: {_first_line(error)}") from error


def _merit(metrics: dict[str, float]) -> float:
    return metrics.get(BEST_BY, -math.inf)


@cache
def _hide_abandoned_reads() -> None:
    """Hides what the reads print that Orbax abandons once one has failed.

    A traceback each, at any later time: when the coroutine is collected, or when TensorStore, in a thread of its own,
    reports to an event loop that is closed by then.
    """
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        read = inspect.iscoroutine(unraisable.object) and unraisable.object.__name__.startswith("_read_array")
        late = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)
        if not (read or late):
            shown(unraisable)

    sys.unraisablehook = show


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
