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


def make_step(loss: Callable, optimizer: optax.GradientTransformation, schedule: optax.Schedule, *, seed: int):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Dropout's randomness follows from the seed and the step alone. The metrics are float32 scalars: loss,
    gradient_norm, learning_rate, finite (1 where the loss and all gradients are) and what the loss adds. What the loss
    puts under "statistics" are parameters by name that no gradient reaches: they replace the old ones.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, rng)
        statistics = metrics.pop("statistics", {})
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = _clip_logit_scale(optax.apply_updates(state.params, updates)) | statistics
        norm = optax.tree.norm(gradients)
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": (jnp.isfinite(value) & jnp.isfinite(norm)).astype(jnp.float32),
            **metrics,
        }
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return step


def _clip_logit_scale(params: Params) -> Params:
    """Clips it where it is stored too: past the limit the loss has no gradient that would bring it back."""
    if "logit_scale" not in params:
        return params
    return {**params, "logit_scale": jnp.minimum(params["logit_scale"], jnp.log(MAX_LOGIT_SCALE))}
