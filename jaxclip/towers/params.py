"""Operations on a model's parameters: shapes, merging, casting, checksums, a check for finite values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclip.models.clip import CLIP

Params = dict[str, Any]


def make_model(config: Any, model: type[nnx.Module] = CLIP) -> tuple[nnx.GraphDef, Params]:
    """Returns the graph of the towers (or another model) and the shapes of its parameters; allocates no arrays."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(shapes)


def merge_params(replacements: Params, params: Params) -> Params:
    """Returns the parameters of both trees; a parameter that is in both has its value in `replacements`."""
    return unflatten_dict({**flatten_dict(params), **flatten_dict(replacements)})


def cast_kernels(params: Params, dtype: str) -> Params:
    """Returns the parameters with their kernels cast to `dtype`; other parameters are not copied.

    Linear maps and convolutions cast their kernels at each use anyway, so that the results are the same. Casting them
    once pays where the same parameters are used for many batches.
    """
    flat = flatten_dict(params)
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel" and leaf.dtype != dtype}
    return unflatten_dict(flat | _cast(kernels, dtype))


@partial(jax.jit, static_argnames="dtype")
def _cast(arrays: dict[tuple, jax.Array], dtype: str) -> dict[tuple, jax.Array]:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), arrays)


def checksum(tree: Any) -> jax.Array:
    """Returns a uint32 checksum of a tree's values as float32; it does not depend on how they are sharded.

    A change of a single value always changes it. Several changes can cancel out, such as a swap of two neighbours.
    """

    def fold(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        position = jnp.uint32(1)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position = position * jnp.uint32(2654435761) + index
        # Odd weights are invertible modulo 2^32, so that a change of a single value always changes the sum.
        return jnp.sum(bits * (position | jnp.uint32(1)), dtype=jnp.uint32)

    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + fold(leaf)
    return total


def finite(params: Params) -> jax.Array:
    """Returns a boolean scalar: whether all values are finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())
