"""Runs exported towers with JAX and NumPy only; this file is copied into the folder of each export.

towers = load("FOLDER")
image = towers.image(pixels)   # (B, S, S, 3) uint8 RGB -> (B, D) float32 unit vectors; S is fixed, B is any number
text = towers.text(tokens)     # (B, T) int32 -> (B, D) float32 unit vectors; T is fixed, B is any number
logits = towers.logit_scale * image @ text.T + towers.logit_bias
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax import export

PARAMS = "params.npz"
TOWERS = {"image": "image_tower.stablehlo", "text": "text_tower.stablehlo"}


@dataclass(frozen=True)
class ExportedTowers:
    """Both towers as functions of arrays, and the scale and bias that turn cosines into logits."""

    image: Callable[[jax.Array], jax.Array]
    text: Callable[[jax.Array], jax.Array]
    logit_scale: float
    logit_bias: float


def load(folder: str | Path) -> ExportedTowers:
    """Returns the towers in a folder; each is compiled for this machine on its first call with each batch size."""
    with np.load(Path(folder) / PARAMS, allow_pickle=False) as file:
        params = {name: jax.numpy.asarray(file[name]) for name in file.files}
    scale, bias = (float(params.pop(name)) for name in ("logit_scale", "logit_bias"))
    towers = {}
    for name, program in TOWERS.items():
        exported = export.deserialize(bytearray((Path(folder) / program).read_bytes()))
        tower_params = {key: value for key, value in params.items() if key.startswith(f"{name}/")}
        towers[name] = jax.jit(exported.call)
        towers[name] = jax.tree_util.Partial(towers[name], tower_params)
    return ExportedTowers(**towers, logit_scale=math.exp(scale), logit_bias=bias)
