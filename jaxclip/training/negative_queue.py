"""A queue of embeddings of earlier batches, kept beside the optimizer's state: saved and resumed with it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxclip.losses.contrastive import Queue

EMPTY = -1


class Queued(NamedTuple):
    """An optimizer's state and the queue beside it."""

    inner: Any
    queue: Queue


def with_queue(optimizer: optax.GradientTransformation, rows: int, dimension: int) -> optax.GradientTransformation:
    """Returns the optimizer with an empty queue of so many pairs in its state; updating leaves the queue as it is."""

    def init(params: Any) -> Queued:
        nothing = jnp.zeros((rows, dimension))
        return Queued(optimizer.init(params), Queue(nothing, nothing, jnp.full(rows, EMPTY, jnp.int32)))

    def update(updates: Any, state: Queued, params: Any = None) -> tuple[Any, Queued]:
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, Queued(inner, state.queue)

    return optax.GradientTransformation(init, update)


def push(queue: Queue, image: Float[Array, "B D"], text: Float[Array, "B D"], group: Int[Array, " B"]) -> Queue:
    """Returns the queue with a batch at its front and as many of the oldest pairs gone."""
    newest = Queue(*map(jax.lax.stop_gradient, (image, text)), group)
    return jax.tree.map(lambda new, old: jnp.concatenate([new.astype(old.dtype), old])[: len(old)], newest, queue)
