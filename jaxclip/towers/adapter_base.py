"""Loads the parameters that config.model.init_from names: a run starts from them, or trains adapters on them."""

from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.models import lora
from jaxclip.towers.checkpoints import BASE, Checkpoints
from jaxclip.towers.params import Params, checksum, merge_params
from jaxclip.towers.pretrained import pretrained_params
from jaxclip.towers.towers import Towers


def initial_params(config: Config, towers: Towers, step: int | None = None) -> tuple[Params, dict[str, Any]]:
    """Returns the parameters of config.model.init_from and a record of them, {"name", "step", "checksum"}.

    The parameters are sharded like those of the towers; adapters are not among them. If init_from is a workdir, they
    are those of the given step (by default the newest), and the moving average if that run has one. A published
    checkpoint's step is None.

    Raises:
      UserError: there is no such checkpoint, its arrays are not those of the towers, or it holds only adapters.
    """
    without_adapters = {path: leaf for path, leaf in flatten_dict(towers.shapes).items() if lora.NAME not in path}
    params, step = pretrained_params(config, unflatten_dict(without_adapters), step)
    return params, {"name": config.model.init_from, "step": step, "checksum": int(jax.jit(checksum)(params))}


def with_base_params(stored: Params, config: Config, towers: Towers, metadata: dict[str, Any]) -> Params:
    """Returns a checkpoint's parameters; if its metadata names a base, those that it lacks are taken from the base.

    Args:
      stored: the parameters that the checkpoint holds.
      metadata: the checkpoint's metadata; it names a base if adapters were trained.

    Raises:
      UserError: as `initial_params`, or config.model.init_from is not the base that the adapters were trained on.
    """
    if BASE not in metadata:
        return stored
    expected = metadata[BASE]
    params, base = initial_params(config, towers, expected["step"])
    if base["checksum"] != expected["checksum"]:
        raise UserError(
            f"config.model.init_from: {base['name']} (step {base['step']}) is not what the adapters were trained on, "
            f"{expected['name']}: the checksum of the parameters of {base['name']} is {base['checksum']}, not "
            f"{expected['checksum']}; set --config.model.init_from to the base of the adapters"
        )
    return merge_params(stored, params)


def checkpoint_params(
    config: Config, towers: Towers, checkpoints: Checkpoints, step: int, parameters: str = ""
) -> Params:
    """Returns all parameters of a workdir's checkpoint, including those of the base if adapters were trained.

    `parameters` is "raw", "ema" (the moving average) or "" (the moving average if there is one). Raises what
    `with_base_params` and `Checkpoints.restore_params` raise.
    """
    stored = checkpoints.restore_params(towers.stored(towers.shapes), step, parameters)
    return with_base_params(stored, config, towers, checkpoints.metadata(step))
