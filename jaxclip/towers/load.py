"""Loads a workdir's checkpoint together with the products of the configured split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxclip.config import Config, load_config
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.pipeline.records import Records
from jaxclip.runtime import distributed
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.adapter_base import checkpoint_params
from jaxclip.towers.checkpoints import Checkpoints, resolve_step
from jaxclip.towers.params import Params
from jaxclip.towers.towers import Towers, load_towers


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A workdir's checkpoint, and the products of the configured split.

    Attributes:
      towers: the towers, without their parameters.
      params: the parameters of the towers.
      records: the products of the split.
      step: the number of the checkpoint's step.
      data_fingerprint: hash of the prepared dataset's products and splits, without computed features.
      parameters: "ema" if `params` are the moving average, else "raw".
      averaged: whether the checkpoint has a moving average.
      notes: what must be said with figures on these products (see `trained_groups.unseen_records`).
    """

    towers: Towers
    params: Params
    records: Records
    step: int
    data_fingerprint: str
    parameters: str
    averaged: bool
    notes: list[str]


def load_checkpoint(
    config: Config,
    workdir: Path,
    step: str,
    *,
    parameters: str = "",
    prepared: Path | None = None,
    trained_by: Sequence[Path] = (),
    say: Callable[[str], None],
) -> LoadedCheckpoint:
    """Returns a workdir's checkpoint and the products of the configured split.

    Products of a validation or test split whose group was trained on are left out.

    Args:
      config: the configuration of the workdir.
      workdir: where the checkpoint is.
      step: "latest", "best" or a number.
      parameters: "raw", "ema" (the moving average) or "" (the moving average if there is one).
      prepared: the prepared dataset; by default that of the configured catalogue, which is prepared if need be.
      trained_by: other workdirs whose training products are left out too.
      say: called with each line of progress.

    Raises:
      UserError: the workdir is a re-ranker's, there is no such checkpoint or average, or the catalogue is unreadable.
    """
    if config.task == "rerank":
        raise UserError(f"{workdir} holds a re-ranker: name the workdir of its towers, {config.first_stage}, instead")
    checkpoints = Checkpoints(workdir, read_only=True)
    number = resolve_step(step, checkpoints)
    prepared = prepared or prepared_data.prepared_dataset(config, say=say)
    trained = trained_groups.of_runs([workdir, *trained_by], say)
    records, notes = trained_groups.unseen_records(prepared, config.data.split, trained, say)
    notes += chosen_on(workdir, step, config, say)
    data_fingerprint = prepared_data.data_fingerprint(prepared)
    facts = {"data fingerprint": data_fingerprint, "checkpoint": number, "products": records.fingerprint()}
    distributed.check_identical("run", facts, "All need the same prepared dataset and a shared workdir")
    towers = load_towers(config, workdir)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, number, parameters)
    averaged = checkpoints.keeps_average(number)
    resolved = parameters or ("ema" if averaged else "raw")
    return LoadedCheckpoint(towers, params, records, number, data_fingerprint, resolved, averaged, notes)


def chosen_on(workdir: Path, step: str, config: Config, say: Callable[[str], None]) -> list[str]:
    """Returns what must be said, and says it, if the best step of a run was chosen on the configured split.

    Runs of earlier versions had no validation split, and their best step is that with the highest hit@1 on the split
    that they report. The best step of other runs is chosen on validation, of which `trained_groups.unseen_records` says
    so.
    """
    own = load_config(workdir).data
    if step != "best" or own.validation or own.split != config.data.split:
        return []
    note = f"--step=best of {workdir} was chosen on the split {own.split}, so figures on it are too good"
    say(note)
    return [note]
