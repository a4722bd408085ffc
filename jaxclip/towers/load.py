"""Loads a workdir's checkpoint together with the products of the configured split."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data
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
    """

    towers: Towers
    params: Params
    records: Records
    step: int
    data_fingerprint: str
    parameters: str
    averaged: bool


def load_checkpoint(
    config: Config,
    workdir: Path,
    step: str,
    *,
    parameters: str = "",
    prepared: Path | None = None,
    say: Callable[[str], None],
) -> LoadedCheckpoint:
    """Returns a workdir's checkpoint and the products of the configured split.

    Args:
      config: the configuration of the workdir.
      workdir: where the checkpoint is.
      step: "latest", "best" or a number.
      parameters: "raw", "ema" (the moving average) or "" (the moving average if there is one).
      prepared: the prepared dataset; by default that of the configured catalogue, which is prepared if need be.
      say: called with each line of progress.

    Raises:
      UserError: the workdir is a re-ranker's, there is no such checkpoint or average, or the catalogue is unreadable.
    """
    if config.task == "rerank":
        raise UserError(f"{workdir} holds a re-ranker: name the workdir of its towers, {config.first_stage}, instead")
    checkpoints = Checkpoints(workdir, read_only=True)
    number = resolve_step(step, checkpoints)
    prepared = prepared or prepared_data.prepared_dataset(config, say=say)
    records = Records(prepared, config.data.split)
    data_fingerprint = prepared_data.data_fingerprint(prepared)
    facts = {"data fingerprint": data_fingerprint, "checkpoint": number}
    distributed.check_identical("run", facts, "All need the same prepared dataset and a shared workdir")
    towers = load_towers(config, workdir)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, number, parameters)
    averaged = checkpoints.keeps_average(number)
    resolved = parameters or ("ema" if averaged else "raw")
    return LoadedCheckpoint(towers, params, records, number, data_fingerprint, resolved, averaged)
