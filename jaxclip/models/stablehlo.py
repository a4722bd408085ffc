"""Towers as portable programs (jax.export): StableHLO with a symbolic batch, parameters in a separate file."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from jaxclip.models import exported
from jaxclip.models.clip import CLIPConfig, ImageConfig, ImageTower, TextConfig, TextTower, normalise

PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = "load_towers.py"


def write(config: CLIPConfig, params: dict[str, Any], folder: Path) -> list[str]:
    """Writes both towers, their parameters and a Python file that loads them; returns the names of the files.

    The programs accept any number of pictures or captions and run on CPUs, NVIDIA GPUs and TPUs. JAX promises that its
    releases of the following six months can read them.

    Args:
      config: the shape of the towers, without adapters.
      params: their nested parameters.
      folder: an existing folder, to which the files are written.
    """
    batch = export.symbolic_shape("batch")[0]
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, config.image.size, config.image.size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((batch, config.text.context_length), jnp.int32),
    }
    towers = {"image": (ImageTower, _portable(config.image)), "text": (TextTower, _portable(config.text))}
    stored = {"logit_scale": params["logit_scale"], "logit_bias": params.get("logit_bias", np.float32(0))}
    for name, (tower, shape) in towers.items():
        graph, _ = nnx.split(nnx.eval_shape(lambda: tower(shape, config.embedding, rngs=nnx.Rngs(0))))  # noqa: B023
        flat, build = _flatten(name, params[name])
        program = _serialize(graph, build, flat, inputs[name])
        (folder / exported.TOWERS[name]).write_bytes(program)
        stored |= flat
    np.savez(folder / exported.PARAMS, **{name: np.asarray(value) for name, value in stored.items()})
    shutil.copyfile(exported.__file__, folder / LOADER)
    return [*exported.TOWERS.values(), exported.PARAMS, LOADER]


def _portable(tower: ImageConfig | TextConfig) -> ImageConfig | TextConfig:
    """Returns the tower with attention by XLA: kernels are for one platform, and for a known number of examples."""
    return replace(tower, transformer=replace(tower.transformer, attention="xla"))


def _flatten(tower: str, params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Returns the parameters as a dict by name, and a function that builds the nested parameters from such a dict."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [f"{tower}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in leaves]
    flat = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    return flat, lambda named: structure.unflatten([named[name] for name in names])


def _serialize(graph: nnx.GraphDef, build: Any, params: dict[str, Any], inputs: jax.ShapeDtypeStruct) -> bytes:
    def encode(named: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return normalise(nnx.merge(graph, build(named))(x))

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
    return bytes(export.export(jax.jit(encode), platforms=PLATFORMS)(shapes, inputs).serialize())
