"""Towers as portable programs (jax.export): StableHLO with a symbolic batch, parameters in a separate file."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from jaxclip.models import exported
from jaxclip.models.clip import CLIPConfig, ImageTower, TextTower, unit

PLATFORMS = ("cpu", "cuda", "tpu")
LOADER = "load_towers.py"


def write(config: CLIPConfig, params: dict[str, Any], folder: Path) -> list[str]:
    """Writes both towers, their parameters and the file that loads them into a folder; returns the files' names.

    The programs take any number of pictures or captions and run on CPU, GPU and TPU; JAX keeps them readable for half a
    year at least.
    """
    batch = export.symbolic_shape("batch")[0]
    inputs = {
        "image": jax.ShapeDtypeStruct((batch, config.image.size, config.image.size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((batch, config.text.context_length), jnp.int32),
    }
    makers = {"image": (ImageTower, config.image), "text": (TextTower, config.text)}
    stored = {"logit_scale": params["logit_scale"], "logit_bias": params.get("logit_bias", np.float32(0))}
    for name, (tower, shape) in makers.items():
        graph, _ = nnx.split(nnx.eval_shape(lambda: tower(shape, config.embedding, rngs=nnx.Rngs(0))))  # noqa: B023
        flat, build = _named(name, params[name])
        program = _program(graph, build, flat, inputs[name])
        (folder / exported.TOWERS[name]).write_bytes(program)
        stored |= flat
    np.savez(folder / exported.PARAMS, **{name: np.asarray(value) for name, value in stored.items()})
    shutil.copyfile(exported.__file__, folder / LOADER)
    return [*exported.TOWERS.values(), exported.PARAMS, LOADER]


def _named(tower: str, params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Returns the parameters by name, and what makes a tree of such a dict again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [f"{tower}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in leaves]
    flat = dict(zip(names, (leaf for _, leaf in leaves), strict=True))
    return flat, lambda named: structure.unflatten([named[name] for name in names])


def _program(graph: nnx.GraphDef, build: Any, params: dict[str, Any], inputs: jax.ShapeDtypeStruct) -> bytes:
    def encode(named: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return unit(nnx.merge(graph, build(named))(x))

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
    return bytes(export.export(jax.jit(encode), platforms=PLATFORMS)(shapes, inputs).serialize())
