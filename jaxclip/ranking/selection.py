"""Counts and selects the scores of one tile: the plain definitions.

A *line* is a query (a row of the tile) or a gallery item (a column of the tile). Of each line, the scores that reach
its thresholds are counted, and the k best are selected. The program reads the tile a fixed number of times, whatever
the scores are, and has no loop whose length depends on them: on GPUs the host decides after each turn of such a loop
whether another follows. `cpu_selection` has a faster form of `count_and_select` for CPUs, and `gpu_selection` one of
`top_k` for GPUs; `runtime.compiler.TABLE` lists them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip.ranking import gpu_selection
from jaxclip.runtime import compiler

NOWHERE = np.iinfo(np.int32).max  # the item in a place of a list of best scores that holds no score yet
AT_ONCE = 8  # largest number of thresholds of each line that are compared with the scores in one pass


class Thresholds(NamedTuple):
    """The thresholds of each line, at or above which scores are counted: the scores of its relevant pairs.

    Attributes:
      limits: (..., R, lines) float32, R places for the thresholds of each line, R a power of two; inf in the places
        that a line with fewer pairs leaves empty.
      width: the number of places that are read in each block or tile: the most pairs that a line of it has, at least 1.
    """

    limits: jax.Array | np.ndarray
    width: jax.Array | np.ndarray


def mask(scores, real, has_padding):
    """Returns the scores (B, T) with -inf where `real` (B, T) is false, and 0.0 instead of -0.0.

    `top_k` may sort -0.0 below 0.0, but they are equal scores. `has_padding`, whether `real` is false anywhere, is not
    needed.
    """
    del has_padding
    return jnp.where(real, jnp.where(scores == 0, 0.0, scores), -jnp.inf)


def count_and_select(scores, thresholds, best, first, offset, *, axis):
    """Returns, for one direction, the counts (R, lines) of scores at or above each limit, and the new best.

    The best are sorted by descending score, ties by ascending item. Counts in places of a line without a threshold, and
    the items of scores of -inf, which is the score of padding, have no meaning.

    Args:
      scores: (B, T) one tile.
      thresholds: limits (R, lines), and the number of limits in use, which this form does not need.
      best: the best values and their items (k, lines) before this tile; a column's items are queries.
      first: whether this is the lines' first tile; not needed.
      offset: number of the first item of each line in this tile.
      axis: the axis of the scores along which a line runs.
    """
    del first
    values, items = best
    counts = _count(scores, thresholds.limits, axis)
    if not len(values):
        return counts, best
    new_values, places = top_k(scores if axis else scores.T, len(values))  # (lines, k)
    values = jnp.concatenate([values, new_values.T])
    items = jnp.concatenate([items, offset + places.T])
    values, items = lax.sort((-values, items), dimension=0, is_stable=False, num_keys=2)
    return counts, (-values[: len(best[0])], items[: len(best[0])])


def _count(scores, limits, axis):
    """Returns (R, lines) how many scores of each line are at or above each of its limits, AT_ONCE limits per pass."""

    def count(limits):
        return jnp.stack([jnp.sum(scores >= jnp.expand_dims(limit, axis), axis, dtype=jnp.int32) for limit in limits])

    if len(limits) <= AT_ONCE:
        return count(limits)
    return lax.map(count, limits.reshape(-1, AT_ONCE, limits.shape[1])).reshape(limits.shape)


def top_k(scores, k: int):
    """Returns the k largest scores of each line and their places, (..., k) each, best first, ties by ascending place.

    Args:
      scores: (..., n) float32, n for each line, without NaN and without -0.0.
      k: at most n.
    """
    return gpu_selection.top_k(scores, k) if compiler.has_form("top_k") else lax.top_k(scores, k)
