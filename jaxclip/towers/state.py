"""The training state: what a checkpoint holds and a step turns into the next."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclip.models.clip import CLIP
from jaxclip.towers.sharding import shardings
from jaxclip.towers.trainable import EVERYTHING, Trainable

Params = dict[str, Any]


class TrainState(NamedTuple):
    """Parameters, the optimizer's state and the number of steps taken. All else follows from config and step.

    The optimizer's state is of what is trained alone; `ema` is the moving average of the arrays of which any part is
    trained, None where none is kept.
    """

    step: jax.Array
    params: Params
    optimizer: Any
    ema: Params | None = None


def make_model(config: Any, model: type[nnx.Module] = CLIP) -> tuple[nnx.GraphDef, Params]:
    """Returns the graph of the towers (or another model) and the shapes of its parameters, allocating nothing."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(shapes)


def abstract_state(
    shapes: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: Trainable = EVERYTHING,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, as a checkpoint is restored into."""
    state = jax.eval_shape(lambda params: _at_start(params, optimizer, trainable, ema), shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def initial_state(
    config: Any,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    trainable: Trainable = EVERYTHING,
    *,
    seed: int,
    base: Params | None = None,
    model: type[nnx.Module] = CLIP,
) -> TrainState:
    """Returns the state of step 0, each array made where `abstract` places it; the same on every mesh.

    Parameters that `base` has are taken from it, its arrays going into the state; the others are drawn.
    """

    def make(key: jax.Array, base: Params) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(model(config, rngs=nnx.Rngs(params=key))))
        return _at_start(merge_params(base, params), optimizer, trainable, abstract.ema is not None)

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=where, donate_argnums=1)(jax.random.key(seed), base or {})


def _at_start(params: Params, optimizer: optax.GradientTransformation, trainable: Trainable, ema: bool) -> TrainState:
    average = trainable.stored(params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable.pick(params)), average)


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
