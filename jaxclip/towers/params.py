"""Parameters: made, merged, cast, summed."""

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
    """Returns the graph of the towers (or another model) and the shapes of its parameters, allocating nothing."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(shapes)


def merge_params(some: Params, params: Params) -> Params:
    """Returns the parameters with those that `some` has in their place."""
    return unflatten_dict({**flatten_dict(params), **flatten_dict(some)})


def cast_kernels(params: Params, dtype: str) -> Params:
    """Returns parameters whose kernels are in `dtype`, to which linear maps and convolutions round them at each use.

    Whoever uses the same parameters for many batches spares each of them that. What is no kernel is not copied.
    """
    flat = flatten_dict(params)
    kernels = {path: leaf for path, leaf in flat.items() if path[-1] == "kernel" and leaf.dtype != dtype}
    return unflatten_dict(flat | _in_type(kernels, dtype))


@partial(jax.jit, static_argnames="dtype")
def _in_type(arrays: dict[tuple, jax.Array], dtype: str) -> dict[tuple, jax.Array]:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), arrays)


def checksum(tree: Any) -> jax.Array:
    """Returns a uint32 that changes with any bit of a tree's arrays, whatever mesh they lie on."""

    def fold(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jnp.uint32(1)
        for axis in range(leaf.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            place = place * jnp.uint32(2654435761) + index
        return jnp.sum(bits * (place | jnp.uint32(1)), dtype=jnp.uint32)

    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + fold(leaf)
    return total


def finite(params: Params) -> jax.Array:
    """Returns whether all parameters are."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of values that every device holds."""
    return NamedSharding(mesh, PartitionSpec())
