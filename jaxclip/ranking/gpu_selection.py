"""Selects the best scores of each line without sorting whole lines, as XLA does on GPUs for `lax.top_k`."""

import math

import jax.numpy as jnp
from jax import lax


def top_k(scores, k: int):
    """Returns the same as `selection.top_k`, from the k groups of neighbours that have the largest maxima.

    Every one of the k best scores lies in one of these groups: if the group of a score is not among them, the maxima of
    k other groups come before the score, because they are larger, or equal and at lower places. Groups of sqrt(n / k)
    scores leave the fewest to sort, 2 * sqrt(n * k) of a line's n.
    """
    *lines, n = scores.shape
    size = 2 ** int(math.log2(n / k) / 2)
    padded = jnp.pad(scores, [(0, 0)] * len(lines) + [(0, -n % size)], constant_values=-jnp.inf)
    groups = padded.reshape(*lines, -1, size)
    _, chosen = _best(groups.max(axis=-1), jnp.arange(groups.shape[-2], dtype=jnp.int32), k)
    candidates = jnp.take_along_axis(groups, chosen[..., None], axis=-2, mode="promise_in_bounds")  # (..., k, size)
    places = chosen[..., None] * size + jnp.arange(size, dtype=jnp.int32)
    return _best(candidates.reshape(*lines, -1), places.reshape(*lines, -1), k)


def _best(scores, places, k):
    """Returns the k best scores of each line and their places, (..., k) each, ties by ascending place."""
    scores, places = lax.sort((-scores, jnp.broadcast_to(places, scores.shape)), is_stable=False, num_keys=2)
    return -scores[..., :k], places[..., :k]
