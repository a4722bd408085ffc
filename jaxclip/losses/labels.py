"""What a loss knows about each pair besides its embeddings: which pairs are no negatives of each other, and weights."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Labels(NamedTuple):
    """Labels of B pairs; what is None is not used, and costs nothing.

    Attributes:
      group: pairs of one group show the same product and are not used as each other's negatives.
      query: number of each pair's text if it is a query with judged products, negative if it is a caption. Pairs with
        one query are not used as each other's negatives, because both images are answers to it.
      weight: weight >= 0 of each pair in the loss; a pair of weight 0 is only a negative of others.
    """

    group: Int[Array, " B"] | None = None
    query: Int[Array, " B"] | None = None
    weight: Float[Array, " B"] | None = None


NO_LABELS = Labels()
_SMALLEST = 1e-20  # so small that only 0 is below it, and so large that its reciprocal times a logit scale is finite


def is_alike(rows: Labels, columns: Labels) -> Bool[Array, "R C"] | None:
    """Returns whether each row and column are of one group or one query; None if neither is used.

    Raises:
      ValueError: only one side has groups, or queries.
    """
    by_group, by_query = (_equal(*sides) for sides in zip(rows[:2], columns[:2], strict=True))
    if by_query is None:
        return by_group
    by_query &= (rows.query >= 0)[:, None]
    return by_query if by_group is None else by_group | by_query


def _equal(rows: Array | None, columns: Array | None) -> Array | None:
    if (rows is None) != (columns is None):
        raise ValueError("groups or queries are known of one side only, such as the batch but not the queue")
    return None if rows is None else rows[:, None] == columns


def weighted_mean(values: Float[Array, " B"], weight: Float[Array, " B"] | None) -> Float[Array, ""]:
    """Returns the mean of the values, weighted if there are weights; 0 if all weights are 0."""
    if weight is None:
        return values.mean()
    return jnp.sum(values * weight) / divisor(jnp.sum(weight))


def divisor(total: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a sum of weights to divide by, which is not 0 even if all weights are."""
    return jnp.maximum(total, _SMALLEST)
