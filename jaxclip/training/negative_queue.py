"""A queue of embeddings of earlier batches as negatives, in the optimizer state, so that checkpoints contain it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxclip.losses.contrastive import Queue

EMPTY = -1  # value of `Queue.group` in unused rows of the queue


class OptimizerWithQueue(NamedTuple):
    """Optimizer state with a queue of negatives.

    Attributes:
      inner: state of the optimizer itself.
      queue: newest pairs first.
    """

    inner: Any
    queue: Queue


def with_queue(optimizer: optax.GradientTransformation, rows: int, dimension: int) -> optax.GradientTransformation:
    """Returns the optimizer with an empty queue of `rows` pairs in its state; `update` does not change the queue."""

    def init(params: Any) -> OptimizerWithQueue:
        zeros = jnp.zeros((rows, dimension))
        return OptimizerWithQueue(optimizer.init(params), Queue(zeros, zeros, jnp.full(rows, EMPTY, jnp.int32)))

    def update(updates: Any, state: OptimizerWithQueue, params: Any = None) -> tuple[Any, OptimizerWithQueue]:
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, OptimizerWithQueue(inner, state.queue)

    return optax.GradientTransformation(init, update)


def push(queue: Queue, image: Float[Array, "B D"], text: Float[Array, "B D"], group: Int[Array, " B"]) -> Queue:
    """Returns the queue with the batch in front and the oldest pairs dropped; no gradient passes through it."""
    newest = Queue(*map(jax.lax.stop_gradient, (image, text)), group)
    return jax.tree.map(lambda new, old: jnp.concatenate([new.astype(old.dtype), old])[: len(old)], newest, queue)
