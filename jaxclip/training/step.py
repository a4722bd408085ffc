"""One training step as a pure function of (state, batch)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from jaxclip.losses.contrastive import info_nce
from jaxclip.models.clip import MAX_LOGIT_SCALE
from jaxclip.training.state import Params, TrainState
from jaxclip.training.trainable import EVERYTHING, Trainable

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_loss(graph: nnx.GraphDef, *, mask_groups: bool, learned_temperature: bool) -> Callable:
    """Returns loss(params, batch, rng) -> (value, metrics) for batches of image, text and group."""

    def loss(params: Params, batch: Batch, rng: Array | None) -> tuple[Array, Metrics]:
        embeddings = nnx.merge(graph, params)(batch["image"], batch["text"], rng=rng)
        scale = embeddings.logit_scale
        scale = scale if learned_temperature else jax.lax.stop_gradient(scale)
        groups = batch["group"] if mask_groups else None
        value, accuracy = info_nce(embeddings.image, embeddings.text, scale, groups)
        return value, {"logit_scale": scale, **accuracy}

    return loss


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    trainable: Trainable = EVERYTHING,
    *,
    seed: int,
    ema: float = 0.0,
):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Gradients are taken of what is trainable alone; `ema` is the decay of its moving average, where the state has one.
    Dropout's randomness follows from the seed and the step alone. The metrics are float32 scalars: loss,
    gradient_norm, learning_rate, finite (1 where the loss and all gradients are) and what the loss adds.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        trained = trainable.pick(state.params)

        def loss_of(trained: Params) -> tuple[Array, Metrics]:
            return loss(trainable.assemble(trained, state.params), batch, rng)

        (value, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
        trained = _clip_logit_scale(optax.apply_updates(trained, updates))
        average = None if state.ema is None else _averaged(state.ema, trained, trainable, _decay(ema, state.step))
        norm = optax.tree.norm(gradients)
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": (jnp.isfinite(value) & jnp.isfinite(norm)).astype(jnp.float32),
            **metrics,
        }
        return TrainState(state.step + 1, trainable.put(trained, state.params), optimizer_state, average), metrics

    return step


def _averaged(average: Params, trained: Params, trainable: Trainable, decay: Array) -> Params:
    """Returns decay * average + (1 - decay) * trained, what is not trained as it was."""
    return trainable.put(optax.incremental_update(trained, trainable.pick(average), 1 - decay), average)


def _decay(limit: float, step: Array) -> Array:
    """Returns the decay of a step, at most (1 + step) / (10 + step): the start is soon forgotten.

    As in TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return jnp.minimum(limit, (1 + step) / (10 + step)).astype(jnp.float32)


def _clip_logit_scale(params: Params) -> Params:
    """Clips it where it is stored too: past the limit the loss has no gradient that would bring it back."""
    if "logit_scale" not in params:
        return params
    return {**params, "logit_scale": jnp.minimum(params["logit_scale"], jnp.log(MAX_LOGIT_SCALE))}
