"""Counts and selects the scores of one tile, written so that XLA's CPU back end compiles it to a fast program.

`count_and_select` and `mask` equal the plain definitions of the same names in `selection`. For each of its two lines, a
score yields two bits, which are packed into words of 16 scores: whether the score reaches the line's first threshold,
and whether it may be one of the line's k best (such scores are candidates, which are then merged into the best).
Packing is cheap compared with computing the scores, and only the candidates, usually few per line and tile, are read
one by one, in loops whose length depends on the scores.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip.ranking.selection import NOWHERE

WORD = 16  # scores per uint32 word; 16 bits mark the scores to count, and 16 bits mark the candidates
CHUNK = 512  # largest number of lines whose candidates are merged at the same time
HALVINGS = 10  # bisection steps of the search for a lower bound of a line's k-th best score
_SENTINEL = np.float32(np.inf), -1  # a score and an item that sort before all others


def mask(scores, real, has_padding):
    """Returns the scores (B, T) with -inf where `real` is false; without padding, the scores are not read.

    This is a loop of zero or one iterations, because a conditional would copy the tile.
    """
    masks = has_padding.astype(jnp.int32)
    return lax.fori_loop(0, masks, lambda _, scores: jnp.where(real, scores, -jnp.inf), scores)


def count_and_select(scores, thresholds, best, first, offset, *, axis):
    """Returns the same as `selection.count_and_select`, if the best before this tile are from tiles of lower items.

    `first` saves reading the scores of the lines' other tiles once more.
    """
    limits, width = thresholds
    values, items = best

    def count(j, counts):
        limit = jnp.expand_dims(limits[j], axis)
        return counts.at[j].set(_total(sum((part >= limit).astype(jnp.int32) for part in _slices(scores, axis)), axis))

    counts = jnp.zeros(limits.shape, jnp.int32)
    if not len(values):
        return lax.fori_loop(0, width, count, counts), best
    floor = jnp.maximum(values[-1], _lower_bound(scores, first, len(values), axis))
    words = _words(scores, limits[0], floor, width, axis)
    counts = counts.at[0].set(_total(lax.population_count(words & np.uint32(2**WORD - 1)).astype(jnp.int32), axis))
    if len(limits) > 1:  # the scores at or above the first threshold are counted already, from the words
        counts = lax.fori_loop(1, width, count, counts)
    return counts, _merge_candidates(values, items, scores, words >> WORD, offset, axis)


def _slices(array, axis):
    """Returns WORD parts of equal length, cut along the axis; bit i of word w stands for element w of part i."""
    return jnp.split(array, WORD, axis=axis)


def _total(counts, axis):
    """Returns the sums along the axis; adds halves first, because XLA vectorises such additions along either axis."""
    while counts.shape[axis] % 2 == 0 and counts.shape[axis] > 8:
        counts = sum(jnp.split(counts, 2, axis=axis))
    return counts.sum(axis)


def _words(scores, limit, floor, width, axis):
    """Returns the words of `_pack`, computed in a loop of one iteration (`width` is at least 1).

    The loop makes XLA write the words to memory once; otherwise it fuses the packing into each of their consumers.
    """
    words = jnp.zeros(_with_size(scores.shape, axis, scores.shape[axis] // WORD), jnp.uint32)
    limit, floor = jnp.expand_dims(limit, axis), jnp.expand_dims(floor, axis)
    return lax.fori_loop(0, jnp.minimum(width, 1), lambda _, words: _pack(scores, limit, floor, axis), words)


def _pack(scores, limit, floor, axis):
    """Returns uint32 words along `axis`; each stands for WORD scores, one from each part that `_slices` returns.

    Bit i of a word says whether the score from part i is >= limit, bit WORD + i whether it is > floor. The unrolled
    loop over the parts compiles to one vectorised loop.
    """
    words = None
    for i, part in enumerate(_slices(scores, axis)):
        bits = jnp.where(part >= limit, np.uint32(1 << i), np.uint32(0))
        bits |= jnp.where(part > floor, np.uint32(1 << (WORD + i)), np.uint32(0))
        words = bits if words is None else words | bits
    return words


def _lower_bound(scores, first, k, axis):
    """Returns (lines,) a lower bound of each line's k-th best score: at least k of its words' maxima exceed it.

    A word's maximum is the largest of the WORD scores that it stands for. Only a line's first tile needs the bound; if
    `first` is false, the bound is -inf, and no score is read.
    """
    size = scores.shape[axis] // WORD

    def include_part(part, maxima):
        return jnp.maximum(maxima, lax.dynamic_slice_in_dim(scores, part * size, size, axis))

    lowest = jnp.full_like(scores, -3.4e38, shape=_with_size(scores.shape, axis, size))  # below NAN
    maxima = jnp.minimum(lax.fori_loop(0, jnp.where(first, WORD, 0), include_part, lowest), 3e38)  # below infinity

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * low + 0.5 * high
        enough = _total((maxima >= jnp.expand_dims(middle, axis)).astype(jnp.int32), axis) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bound, _ = lax.fori_loop(0, jnp.where(first, HALVINGS, 0), halve, (maxima.min(axis), maxima.max(axis)))
    return jnp.where(first, bound - 1e-6 * jnp.abs(bound) - 1e-30, -jnp.inf)


def _with_size(shape, axis, size):
    """Returns the shape with `size` at the axis."""
    return shape[:axis] + (size,) + shape[axis + 1 :]


def _merge_candidates(values, items, scores, words, offset, axis):
    """Returns the best values and items (k, lines) after merging the candidates: best first, ties by ascending item.

    Lines are merged CHUNK at a time in descending order of their number of candidates, so that all lines of a chunk
    have similar numbers. A summary with one bit per word lets each line skip the words without candidates.

    Args:
      values, items: (k, lines) the best before this tile.
      scores: (B, T) this tile.
      words: the high halves of `_pack`'s words, which mark the candidates.
      offset: number of the first item of each line in this tile.
      axis: the axis of the scores along which a line runs.
    """
    lines, size = values.shape[1], words.shape[axis]
    counts = _total(lax.population_count(words).astype(jnp.int32), axis)  # (lines,)
    order = _order(-counts)
    places = _order(order)  # the position of each line in that order
    chunk = min(CHUNK, lines)
    order = jnp.pad(order, (0, -lines % chunk), mode="edge")
    has_candidates = jnp.moveaxis(words != 0, axis, 0)  # (words, lines)
    groups = -(-size // 32)
    has_candidates = jnp.pad(has_candidates, ((0, groups * 32 - size), (0, 0))).reshape(32, groups, lines)
    bits = (jnp.where(has_candidates[bit], np.uint32(1 << bit), np.uint32(0)) for bit in range(32))
    summary = sum(bits)  # (groups, lines)

    def take(array, along, line):
        return array[line, along] if axis else array[along, line]

    def merge_chunk(number, best):
        line = lax.dynamic_slice_in_dim(order, number * chunk, chunk)

        def merge_one(_, carry):
            values, items, summary, word, bits = carry
            group = jnp.argmax(summary != 0, axis=0)  # (chunk,)
            rest = jnp.take_along_axis(summary, group[None], axis=0)[0]
            next_word = jnp.minimum(group + groups * _lowest(rest), size - 1)
            empty = bits == 0
            taken = empty & (jnp.arange(groups)[:, None] == group)
            summary = jnp.where(taken, rest & (rest - np.uint32(1)), summary)
            word = jnp.where(empty, next_word, word)
            bits = jnp.where(empty, jnp.where(rest != 0, take(words, next_word, line), np.uint32(0)), bits)
            place = jnp.minimum(word + size * _lowest(bits), WORD * size - 1)
            score = jnp.where(bits != 0, take(scores, place, line), -jnp.inf)
            item = jnp.where(bits != 0, offset + place, NOWHERE)
            values, items = _insert(values, items, score, item)
            return values, items, summary, word, bits & (bits - np.uint32(1))

        nothing = jnp.zeros(chunk, jnp.int32), jnp.zeros(chunk, jnp.uint32)
        lists = (lax.dynamic_slice_in_dim(part, number * chunk, chunk, axis=1) for part in best)
        merged = lax.fori_loop(0, counts[line[0]], merge_one, (*lists, summary[:, line], *nothing))
        return tuple(
            lax.dynamic_update_slice_in_dim(part, new, number * chunk, axis=1)
            for part, new in zip(best, merged[:2], strict=True)
        )

    chunks = (jnp.sum(counts > 0, dtype=jnp.int32) + chunk - 1) // chunk
    # Lines are gathered into that order and gathered back; XLA's CPU back end would loop over the lines of a scatter.
    ordered = (
        jnp.pad(part[:, order], ((1, 0), (0, 0)), constant_values=sentinel)
        for part, sentinel in zip((values, items), _SENTINEL, strict=True)
    )
    return tuple(part[1:, places] for part in lax.fori_loop(0, chunks, merge_chunk, tuple(ordered)))


def _order(numbers):
    """Returns the indices that stably sort int32 numbers (N,), ascending; (number + 1) * N must fit into an int32."""
    size = len(numbers)
    return lax.sort(numbers * size + jnp.arange(size, dtype=jnp.int32)) % size  # faster than sorting two operands


def _lowest(bits):
    """Returns the index of the lowest set bit, 32 if no bit is set."""
    return lax.population_count(~bits & (bits - np.uint32(1))).astype(jnp.int32)


def _insert(values, items, score, item):
    """Returns the lists (1 + k, lines) after inserting one score and item per line and dropping the last entry.

    The lists are sorted best first, ties by ascending item. Their first row is a sentinel that sorts before every
    score, so that each other row has a row above it. The concatenation comes last because XLA does not vectorise code
    that reads a shifted list.
    """
    above_stays = _before(values[:-1], items[:-1], score, item)
    stays = _before(values[1:], items[1:], score, item)
    values = jnp.concatenate([values[:1], jnp.maximum(values[1:], jnp.minimum(values[:-1], score))])
    items = jnp.concatenate([items[:1], jnp.where(stays, items[1:], jnp.where(above_stays, item, items[:-1]))])
    return values, items


def _before(value, item, other_value, other_item):
    """Returns whether an entry sorts before another: by descending value, then by ascending item."""
    return (value > other_value) | ((value == other_value) & (item < other_item))
