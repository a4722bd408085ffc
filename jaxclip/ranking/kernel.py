"""The kernel of `ranks`: scores one block of queries against the gallery, tile by tile, and counts and selects scores.

A *line* is a query (a row of the tile) or a gallery item (a column of the tile). For each line the kernel counts the
scores that reach the line's thresholds, and selects the line's k best scores. For each of its two lines, a score yields
two bits, which are packed into words of 16 scores: whether the score reaches the line's first threshold, and whether it
may be one of the line's k best (such scores are candidates, which are then merged into the best). Packing is cheap
compared with computing the scores, and only the candidates, usually few per line and tile, are read one by one.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.runtime import compiler

AXES = ("queries", "gallery")
WORD = 16  # scores per uint32 word; 16 bits mark the scores to count, and 16 bits mark the candidates
MULTIPLE = 64  # every side of a tile is a multiple of this
# If a shard has several tiles and `Layout.max_tile` is at least 2 * VECTORS, the sides of the tiles are multiples of
# VECTORS, so that each of the WORD parts that are packed into words fills whole vector registers.
VECTORS = 256
CHUNK = 512  # largest number of lines whose candidates are merged at the same time
HALVINGS = 10  # bisection steps of the search for a lower bound of a line's k-th best score
# Numbers that replace scores of -inf (and any score below -3.2e38) and scores that are NaN. They sort below all other
# scores, and NaN below -inf. Padding is -inf itself, below both.
MINUS_INFINITY, NAN = np.float32(-3.2e38), np.float32(-3.3e38)
_NOWHERE = np.iinfo(np.int32).max  # the item in a place of a list of best scores that holds no score yet
_SENTINEL = np.float32(np.inf), -1  # a score and an item that sort before all others
State = tuple[jax.Array, jax.Array, jax.Array]


class Thresholds(NamedTuple):
    """The thresholds of each line, at or above which scores are counted: the scores of its relevant pairs.

    Attributes:
      limits: (..., R, lines) float32, R places for the thresholds of each line; inf in the places that a line with
        fewer pairs leaves empty.
      width: the number of places that are read in each block or tile: the most pairs that a line of it has, at least 1.
    """

    limits: jax.Array | np.ndarray
    width: jax.Array | np.ndarray


def keys(scores, *, finite: bool):
    """Returns the scores, with -inf and NaN replaced by finite numbers that sort below all others, NaN last.

    If `finite` is true, every score is certain to be finite, and the scores are returned unchanged.
    """
    return scores if finite else jnp.where(jnp.isnan(scores), NAN, jnp.maximum(scores, MINUS_INFINITY))


def product(queries, gallery):
    """Returns (B, T) float32 dot products of queries (B, D) and gallery items (T, D)."""
    return lax.dot_general(
        queries,
        gallery,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@partial(jax.jit, static_argnames="finite")
def product_keys(queries, gallery, *, finite: bool):
    """Returns (B, T) the `keys` of the scores of queries (B, D) and gallery items (T, D)."""
    return keys(product(queries, gallery), finite=finite)


def empty_state(mesh: Mesh, shards: int, tiles: int, width: int, tile: int, k: int) -> State:
    """Returns the state of the columns (gallery items) before the first block: counts, best scores, their queries.

    The counts (shards, tiles, width, tile) are zero; the lists of the best, (shards, tiles, k, tile), hold no score.
    `shards` is the number of shards of queries, each of which has its own state; `tiles` is the number of tiles of the
    whole gallery, `tile` that of items in a tile, `width` that of thresholds per item, `k` that of best queries to keep
    per item.
    """
    counts = np.zeros((shards, tiles, width, tile), np.int32)
    values = np.full((shards, tiles, k, tile), -np.inf, np.float32)
    items = np.full(values.shape, _NOWHERE)
    sharding = NamedSharding(mesh, P(*AXES))
    return tuple(jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in (counts, values, items))


@cache
def make_visit(mesh: Mesh, *, blocks: int, ks: tuple[int, int], back: bool, finite: bool):
    """Returns the compiled function that scores one block of queries of each shard against all tiles of the gallery.

    A is the number of shards of queries, C that of shards of the gallery; a block has B queries; all shards of the
    gallery together have N tiles of T items; a line has D factors, a row R and a column V thresholds. Its arguments:
      block, sizes: index of the block; counts of queries and of gallery items, beyond which all lines are padding.
      queries, gallery: (A, B, D), (N, T, D).
      row_thresholds, column_thresholds: limits (A, R, B), width a scalar; limits (N, V, T), width (N,).
      spots: (A, N, S, 2) row and column, within each tile, of the S scores to return.
      state: the columns' state, from `empty_state` or the previous block; donated.
    It returns the new state, the rows' counts (A, C, R, B), the rows' k best values and their items, (A, C, k, B) each,
    the scores at the spots (A, N, S), and the number of NaN scores (A, C), 0 if `finite`.

    Args:
      mesh: a mesh with the axes "queries" and "gallery".
      blocks: number of blocks in each shard of queries.
      ks: the numbers of best scores to keep for each row and for each column.
      back: whether to rank queries for gallery items (the columns) too.
      finite: whether every score is certain to be finite.
    """

    def visit(block, sizes, queries, gallery, row_thresholds, column_thresholds, spots, state):
        (row_limits, row_width), (column_limits, column_widths) = row_thresholds, column_thresholds
        # The first axis, over the shards of queries, has only the entry of this device's shard.
        queries, row_thresholds, spots = queries[0], Thresholds(row_limits[0], row_width), spots[0]
        (rows, _), (count, columns, _) = queries.shape, gallery.shape
        first_row = (lax.axis_index("queries") * blocks + block) * rows
        best = jnp.full((ks[0], rows), -jnp.inf), jnp.full((ks[0], rows), _NOWHERE)
        spot_scores = jnp.zeros(spots.shape[:2], jnp.float32)
        counts = jnp.zeros(row_limits.shape[1:], jnp.int32)
        start = counts, best, spot_scores, jnp.int32(0), tuple(part[0] for part in state)

        def step(number, carry):
            row_counts, best, spot_scores, nans, state = carry
            first_column = (lax.axis_index("gallery") * count + number) * columns
            scores = product(queries, gallery[number])  # (B, T)
            real = (first_row + jnp.arange(rows) < sizes[0])[:, None] & (first_column + jnp.arange(columns) < sizes[1])
            if not finite:
                nans += jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32)
                scores = keys(scores, finite=False)
            has_padding = (first_row + rows > sizes[0]) | (first_column + columns > sizes[1])
            # This is a loop of zero or one iterations, because a conditional would copy the tile.
            masks = has_padding.astype(jnp.int32)
            scores = lax.fori_loop(0, masks, lambda _, scores: jnp.where(real, scores, -jnp.inf), scores)
            spot_scores = spot_scores.at[number].set(scores[spots[number, :, 0], spots[number, :, 1]])
            counted, best = _count_and_select(scores, row_thresholds, best, number == 0, first_column, axis=1)
            row_counts += counted
            if back:
                old_counts, *old_best = [part[number] for part in state]
                thresholds = Thresholds(column_limits[number], column_widths[number])
                counted, column_best = _count_and_select(scores, thresholds, old_best, block == 0, first_row, axis=0)
                new = (old_counts + counted, *column_best)
                state = tuple(part.at[number].set(value) for part, value in zip(state, new, strict=True))
            return row_counts, best, spot_scores, nans, state

        counts, best, spot_scores, nans, state = lax.fori_loop(0, count, step, start)
        best = [part[None, None] for part in best]
        return tuple(part[None] for part in state), counts[None, None], *best, spot_scores[None], nans[None, None]

    a, c, ac = P(AXES[0]), P(AXES[1]), P(*AXES)
    mapped = jax.shard_map(
        visit,
        mesh=mesh,
        in_specs=(P(), P(), a, c, Thresholds(a, P()), Thresholds(c, c), ac, ac),
        out_specs=(ac, ac, ac, ac, ac, ac),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=7, compiler_options=compiler.ranks())


def _count_and_select(scores, thresholds, best, first, offset, *, axis):
    """Returns, for one direction, the counts (R, lines) of scores at or above each limit, and the new best.

    Args:
      scores: (B, T) one tile.
      thresholds: limits (R, lines), and the number of limits that are read.
      best: the best values and their items (k, lines) before this tile; a column's items are queries.
      first: whether this is the lines' first tile.
      offset: number of the first item of each line in this tile.
      axis: the axis of the scores along which a line runs.
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
            item = jnp.where(bits != 0, offset + place, _NOWHERE)
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
