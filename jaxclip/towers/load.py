"""A workdir's checkpoint, and the products that it is to look at."""

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
class Loaded:
    """A workdir's checkpoint and the records that it is to look at.

    `parameters` says which they are, "raw" or "ema"; `averaged` whether the run kept an average.
    """

    towers: Towers
    params: Params
    records: Records
    step: int
    data_fingerprint: str
    parameters: str
    averaged: bool


def load(
    config: Config,
    workdir: Path,
    which: str,
    *,
    parameters: str = "",
    prepared: Path | None = None,
    say: Callable[[str], None],
) -> Loaded:
    """Returns the checkpoint `which` ("latest", "best" or a step) of a workdir and the configured split.

    `parameters` is "raw", "ema" or "", which is ema where the run kept one; `prepared` the dataset, where it is not
    the configured catalogue's.

    Raises:
      UserError: there is no such checkpoint or average, or the catalogue is unreadable.
    """
    if config.task == "rerank":
        raise UserError(f"{workdir} re-ranks what towers find: name those, {config.first_stage}")
    checkpoints = Checkpoints(workdir, read_only=True)
    step = resolve_step(which, checkpoints)
    prepared = prepared or prepared_data.prepared_dataset(config, say=say)
    records = Records(prepared, config.data.split)
    data_fingerprint = prepared_data.data_fingerprint(prepared)
    facts = {"data fingerprint": data_fingerprint, "checkpoint": step}
    distributed.check_identical("run", facts, "All need the same prepared dataset and a workdir that they share")
    towers = load_towers(config, workdir)
    meshes.open_collectives(towers.mesh)
    with jax.set_mesh(towers.mesh):
        params = checkpoint_params(config, towers, checkpoints, step, parameters)
    averaged = checkpoints.keeps_average(step)
    taken = parameters or ("ema" if averaged else "raw")
    return Loaded(towers, params, records, step, data_fingerprint, taken, averaged)
