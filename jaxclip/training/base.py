"""The parameters that a run starts from or, where it trains adapters, stands on: those of another run's workdir."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.errors import UserError
from jaxclip.models import lora
from jaxclip.training.checkpoint import Checkpoints
from jaxclip.training.setup import Towers
from jaxclip.training.state import Params, checksum, overlaid

if TYPE_CHECKING:
    from jaxclip.config import Config

BASE = "base"
"""Under this name a checkpoint of adapters says beside it what they stand on: its name, step and checksum."""


def initial_params(config: "Config", towers: Towers, step: int | None = None) -> tuple[Params, dict[str, Any]]:
    """Returns the parameters of the workdir that config.model.init_from names, and their {"name", "step", "checksum"}.

    They are placed as the towers' own. Without a step it is the newest; of a run that kept a moving average, that.

    Raises:
      UserError: there is no such checkpoint, it has other arrays than the towers, or it holds adapters alone.
    """
    folder = Path(config.model.init_from).expanduser()
    checkpoints = Checkpoints(folder, read_only=True)
    if not checkpoints.steps():
        raise UserError(f"config.model.init_from: {folder} has no complete checkpoint")
    step = checkpoints.steps()[-1] if step is None else step
    if BASE in checkpoints.beside(step):
        raise UserError(f"config.model.init_from: {folder} holds adapters alone; name the run that they stand on")
    plain = {path: leaf for path, leaf in flatten_dict(towers.abstract.params).items() if lora.NAME not in path}
    params = checkpoints.restore_params(unflatten_dict(plain), step)
    checkpoints.close()
    return params, {"name": str(folder), "step": step, "checksum": int(jax.jit(checksum)(params))}


def completed(stored: Params, config: "Config", towers: Towers, beside: dict[str, Any]) -> Params:
    """Returns a checkpoint's parameters with those of its base, if it stands on one.

    Raises:
      UserError: as `initial_params`, or the base is not the one that the adapters were trained on.
    """
    if BASE not in beside:
        return stored
    wanted = beside[BASE]
    params, found = initial_params(config, towers, wanted["step"])
    if found["checksum"] != wanted["checksum"]:
        raise UserError(
            f"config.model.init_from: step {wanted['step']} of {found['name']} is not what the adapters were trained "
            f"on, {wanted['name']}: its parameters' checksum is {found['checksum']}, not {wanted['checksum']}"
        )
    return overlaid(stored, params)
