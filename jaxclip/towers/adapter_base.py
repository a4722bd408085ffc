"""The parameters that a run starts from or, where it trains adapters, stands on: those of another checkpoint."""

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
    """Returns the parameters that config.model.init_from names, and their {"name", "step", "checksum"}.

    They are placed as the towers' own. Of a workdir it is the newest step where none is given, and of a run that kept
    a moving average, that; what others published has no step.

    Raises:
      UserError: there is no such checkpoint, it has other arrays than the towers, or it holds adapters alone.
    """
    plain = {path: leaf for path, leaf in flatten_dict(towers.shapes).items() if lora.NAME not in path}
    params, step = pretrained_params(config, unflatten_dict(plain), step)
    return params, {"name": config.model.init_from, "step": step, "checksum": int(jax.jit(checksum)(params))}


def with_base_params(stored: Params, config: Config, towers: Towers, metadata: dict[str, Any]) -> Params:
    """Returns a checkpoint's parameters with those of its base, if it stands on one.

    Raises:
      UserError: as `initial_params`, or the base is not the one that the adapters were trained on.
    """
    if BASE not in metadata:
        return stored
    wanted = metadata[BASE]
    params, found = initial_params(config, towers, wanted["step"])
    if found["checksum"] != wanted["checksum"]:
        raise UserError(
            f"config.model.init_from: {found['name']} (step {found['step']}) is not what the adapters were trained on, "
            f"{wanted['name']}: its parameters' checksum is {found['checksum']}, not {wanted['checksum']}"
        )
    return merge_params(stored, params)


def checkpoint_params(config: Config, towers: Towers, checkpoints: Checkpoints, step: int, which: str = "") -> Params:
    """Returns all parameters of a workdir's checkpoint, adapters metadata what they stand on.

    `which` is "raw", "ema" or "", which is ema where the run kept one; errors as `with_base_params`.
    """
    stored = checkpoints.restore_params(towers.stored(towers.shapes), step, which)
    return with_base_params(stored, config, towers, checkpoints.metadata(step))
