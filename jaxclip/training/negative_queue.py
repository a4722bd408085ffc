"""A queue of embeddings of earlier batches as negatives, in the optimizer state, so that checkpoints contain it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxclip.losses.contrastive import Queue, QueueWithQueries

EMPTY = -1  # value of `Queue.group` in unused rows of the queue


class OptimizerWithQueue(NamedTuple):
    """Optimizer state with a queue of negatives.

    Attributes:
      inner: state of the optimizer itself.
      queue: newest pairs first.
    """

    inner: Any
    queue: Queue | QueueWithQueries


def with_queue(
    optimizer: optax.GradientTransformation, rows: int, dimension: int, *, queries: bool = False
) -> optax.GradientTransformation:
    """Returns the optimizer with an empty queue of `rows` pairs in its state; `update` does not change the queue.

    With `queries` the queue holds `Labels.query` of its pairs.
    """

    def init(params: Any) -> OptimizerWithQueue:
        zeros = jnp.zeros((rows, dimension))
        empty = jnp.full(rows, EMPTY, jnp.int32)
        queue = QueueWithQueries(zeros, zeros, empty, empty) if queries else Queue(zeros, zeros, empty)
        return OptimizerWithQueue(optimizer.init(params), queue)

    def update(updates: Any, state: OptimizerWithQueue, params: Any = None) -> tuple[Any, OptimizerWithQueue]:
        updates, inner = optimizer.update(updates, state.inner, params)
        return updates, OptimizerWithQueue(inner, state.queue)

    return optax.GradientTransformation(init, update)


def push(
    queue: Queue | QueueWithQueries,
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    group: Int[Array, " B"],
    query: Int[Array, " B"] | None = None,
) -> Queue | QueueWithQueries:
    """Returns the queue with the batch in front and the oldest pairs dropped; no gradient passes through it."""
    image, text = map(jax.lax.stop_gradient, (image, text))
    newest = Queue(image, text, group) if query is None else QueueWithQueries(image, text, group, query)
    return jax.tree.map(lambda new, old: jnp.concatenate([new.astype(old.dtype), old])[: len(old)], newest, queue)
