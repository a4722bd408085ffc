"""Training state: parameters, optimizer state, step, moving average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxclip.models.clip import CLIP
from jaxclip.towers.params import Params, merge_params
from jaxclip.towers.sharding import place_shapes
from jaxclip.towers.trainable import EVERYTHING, Trainable


class TrainState(NamedTuple):
    """What a step updates and a checkpoint contains; configuration, data and step determine everything else.

    If there are adapters, a checkpoint contains only the trained arrays of `params` (`Towers.stored`).

    Attributes:
      step: number of steps taken, () int32.
      params: all parameters.
      optimizer: state of the optimizer, for trained parameters only.
      ema: moving average of every array that is trained at least in part; None without averaging.
    """

    step: jax.Array
    params: Params
    optimizer: Any
    ema: Params | None = None

    def parameters(self) -> dict[str, Params]:
        """Returns the parameters as "raw" and, if there is a moving average, the averaged parameters as "ema"."""
        return {"raw": self.params} | ({} if self.ema is None else {"ema": merge_params(self.ema, self.params)})


def abstract_state(
    shapes: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    trainable: Trainable = EVERYTHING,
    *,
    ema: bool = False,
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, with which a checkpoint is restored."""
    state = jax.eval_shape(lambda params: _at_start(params, optimizer, trainable, ema), shapes)
    return place_shapes(state, mesh)


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
    """Returns the state of step 0, sharded as `abstract`; its values are the same on every mesh.

    Parameters in `base` are taken from it, and its arrays are donated; the model initialises all others with `seed`.
    """

    def make(key: jax.Array, base: Params) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(model(config, rngs=nnx.Rngs(params=key))))
        return _at_start(merge_params(base, params), optimizer, trainable, abstract.ema is not None)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=shardings, donate_argnums=1)(jax.random.key(seed), base or {})


def _at_start(params: Params, optimizer: optax.GradientTransformation, trainable: Trainable, ema: bool) -> TrainState:
    average = trainable.stored(params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable.pick(params)), average)
