"""The kernel under `ranks`: one block of queries against the gallery, tile by tile, both directions of each tile.

A *line* is a query (a row of the tile) or a gallery item (a column). Of each score a line keeps two bits, packed into
words of 16 scores: whether it reaches the line's threshold, which is counted, and whether it beats the worst of the
line's best so far, which sends it to be looked at. Reading a tile costs a thirtieth of computing it; only what is
looked at costs more, and that is a few scores per line and tile.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.runtime import compiler

AXES = ("queries", "gallery")
WORD = 16  # scores per word: 16 bits for counting, 16 for looking
MULTIPLE = 64  # of a tile's sides
VECTORS = 256  # of them where there are several tiles: then each word's scores lie in whole vectors
CHUNK = 512  # lines looked at together
HALVINGS = 10  # in the search for a bound of a line's k-th best
# Below every finite score, in this order: -inf scores, then NaN; padding is -inf itself.
MINUS_INFINITY, NAN = np.float32(-3.2e38), np.float32(-3.3e38)
_NOWHERE = np.iinfo(np.int32).max
_FIRST = np.float32(np.inf), -1  # before every score and item
State = tuple[jax.Array, jax.Array, jax.Array]


def keys(scores, *, finite: bool):
    """Returns the scores with -inf and NaN replaced by numbers that sort below all others, in this order."""
    return scores if finite else jnp.where(jnp.isnan(scores), NAN, jnp.maximum(scores, MINUS_INFINITY))


def product(queries, gallery):
    """Returns (B, T) float32 scores of (B, D) and (T, D)."""
    return lax.dot_general(
        queries,
        gallery,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@partial(jax.jit, static_argnames="finite")
def product_keys(queries, gallery, *, finite: bool):
    """Returns the keys of the scores of two blocks."""
    return keys(product(queries, gallery), finite=finite)


def empty_state(mesh: Mesh, shards: int, tiles: int, width: int, tile: int, k: int) -> State:
    """Returns what the columns know before the first block: counts (A, N, R, T), best values and items (A, N, k, T)."""

    counts = np.zeros((shards, tiles, width, tile), np.int32)
    values = np.full((shards, tiles, k, tile), -np.inf, np.float32)
    items = np.full(values.shape, _NOWHERE)
    sharding = NamedSharding(mesh, P(*AXES))
    return tuple(jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in (counts, values, items))


@cache
def make_visit(mesh: Mesh, *, blocks: int, ks: tuple[int, int], back: bool, finite: bool):
    """Returns the compiled function that takes one block of queries of each shard through all tiles of the gallery.

    It maps (block, sizes (Q, G), beyond which is padding, queries (A, B, D), gallery (N, T, D), row thresholds
    (A, R, B), their width in use, column thresholds (N, R', T), their widths (N,), spots (A, N, S, 2), state) to
    (state, counts (A, C, R, B), best values and items (A, C, k, B), scores at the spots (A, N, S), NaNs (A, C)), A and
    C the shards of queries and gallery.

    Args:
      mesh: axes "queries" and "gallery".
      blocks: of queries on each shard.
      ks: how many best each row and each column keeps.
      back: whether columns are counted too.
      finite: whether no score can be infinite or NaN.
    """

    def visit(block, sizes, queries, gallery, row_limits, row_width, column_limits, column_widths, spots, state):
        queries, row_limits, spots = queries[0], row_limits[0], spots[0]  # this shard's
        (rows, _), (count, columns, _) = queries.shape, gallery.shape
        first_row = (lax.axis_index("queries") * blocks + block) * rows
        best = jnp.full((ks[0], rows), -jnp.inf), jnp.full((ks[0], rows), _NOWHERE)
        seen = jnp.zeros(spots.shape[:2], jnp.float32)
        start = jnp.zeros(row_limits.shape, jnp.int32), best, seen, jnp.int32(0), tuple(part[0] for part in state)

        def step(number, carry):
            row_counts, best, seen, nans, state = carry
            first_column = (lax.axis_index("gallery") * count + number) * columns
            scores = product(queries, gallery[number])  # (B, T)
            real = (first_row + jnp.arange(rows) < sizes[0])[:, None] & (first_column + jnp.arange(columns) < sizes[1])
            if not finite:
                nans += jnp.sum(jnp.isnan(scores) & real, dtype=jnp.int32)
                scores = keys(scores, finite=False)
            edge = (first_row + rows > sizes[0]) | (first_column + columns > sizes[1])
            # A loop of no or one turn: unlike a condition it leaves the tile where it is.
            scores = lax.fori_loop(0, edge.astype(jnp.int32), lambda _, s: jnp.where(real, s, -jnp.inf), scores)
            seen = seen.at[number].set(scores[spots[number, :, 0], spots[number, :, 1]])
            counted, best = _read(scores, row_limits, row_width, best, number == 0, first_column, axis=1)
            row_counts += counted
            if back:
                here = [part[number] for part in state]
                counted, found = _read(
                    scores, column_limits[number], column_widths[number], here[1:], block == 0, first_row, axis=0
                )
                new = (here[0] + counted, *found)
                state = tuple(part.at[number].set(value) for part, value in zip(state, new, strict=True))
            return row_counts, best, seen, nans, state

        counts, best, seen, nans, state = lax.fori_loop(0, count, step, start)
        best = [part[None, None] for part in best]
        return tuple(part[None] for part in state), counts[None, None], *best, seen[None], nans[None, None]

    a, c, ac = P(AXES[0]), P(AXES[1]), P(*AXES)
    mapped = jax.shard_map(
        visit,
        mesh=mesh,
        in_specs=(P(), P(), a, c, a, P(), c, c, ac, ac),
        out_specs=(ac, ac, ac, ac, ac, ac),
        check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=9, compiler_options=compiler.ranks())


def _read(scores, limits, width, best, first, offset, *, axis):
    """Returns (counts (R, lines) of scores at or above each limit, the best with this tile's), for one direction.

    Args:
      scores: (B, T). limits: (R, lines), `width` of them in use. best: values and items (k, lines).
      first: whether the lines have seen no tile yet. offset: item number of the tile's first.
      axis: along which a line runs.
    """
    values, items = best

    def count(j, counts):
        limit = jnp.expand_dims(limits[j], axis)
        return counts.at[j].set(_total(sum((part >= limit).astype(jnp.int32) for part in _slices(scores, axis)), axis))

    counts = jnp.zeros(limits.shape, jnp.int32)
    if not len(values):
        return lax.fori_loop(0, width, count, counts), best
    floor = jnp.maximum(values[-1], _bound(scores, first, len(values), axis))
    words = _words(scores, limits[0], floor, width, axis)
    counts = counts.at[0].set(_total(lax.population_count(words & np.uint32(2**WORD - 1)).astype(jnp.int32), axis))
    if len(limits) > 1:  # a loop over the only one would be counted before it
        counts = lax.fori_loop(1, width, count, counts)
    return counts, _merge_candidates(values, items, scores, words >> WORD, offset, axis)


def _slices(array, axis):
    """Returns WORD equal parts of the axis: element w of part i is score i * W + w, bit i of word w."""
    return jnp.split(array, WORD, axis=axis)


def _total(counts, axis):
    """Returns the sums along the axis: by parts of it first, which XLA vectorises along lines too."""
    while counts.shape[axis] % 2 == 0 and counts.shape[axis] > 8:
        counts = sum(jnp.split(counts, 2, axis=axis))
    return counts.sum(axis)


def _words(scores, limit, floor, width, axis):
    """Returns what `_pack` does, from a loop of one turn (`width` is at least 1).

    The loop has the words written once; without it XLA packs them anew in each place that reads them.
    """
    words = jnp.zeros(_shortened(scores.shape, axis, scores.shape[axis] // WORD), jnp.uint32)
    limit, floor = jnp.expand_dims(limit, axis), jnp.expand_dims(floor, axis)
    return lax.fori_loop(0, jnp.minimum(width, 1), lambda _, words: _pack(scores, limit, floor, axis), words)


def _pack(scores, limit, floor, axis):
    """Returns words, `axis` shortened by WORD: bit i says score >= limit, bit WORD + i score > floor.

    Written out score by score it compiles to one vectorised loop.
    """
    words = None
    for i, part in enumerate(_slices(scores, axis)):
        bits = jnp.where(part >= limit, np.uint32(1 << i), np.uint32(0))
        bits |= jnp.where(part > floor, np.uint32(1 << (WORD + i)), np.uint32(0))
        words = bits if words is None else words | bits
    return words


def _bound(scores, first, k, axis):
    """Returns (lines,) a number below the k-th best score of each line: below the maxima of k parts of it.

    Only a line's first tile needs it: where `first` is false it is -inf, and no score is read.
    """
    size = scores.shape[axis] // WORD

    def widen(part, maxima):
        return jnp.maximum(maxima, lax.dynamic_slice_in_dim(scores, part * size, size, axis))

    nothing = jnp.full_like(scores, -3.4e38, shape=_shortened(scores.shape, axis, size))  # below NAN
    maxima = jnp.minimum(lax.fori_loop(0, jnp.where(first, WORD, 0), widen, nothing), 3e38)  # below infinity

    def halve(_, bounds):
        low, high = bounds
        middle = 0.5 * low + 0.5 * high
        enough = _total((maxima >= jnp.expand_dims(middle, axis)).astype(jnp.int32), axis) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bound, _ = lax.fori_loop(0, jnp.where(first, HALVINGS, 0), halve, (maxima.min(axis), maxima.max(axis)))
    return jnp.where(first, bound - 1e-6 * jnp.abs(bound) - 1e-30, -jnp.inf)


def _shortened(shape, axis, size):
    return shape[:axis] + (size,) + shape[axis + 1 :]


def _merge_candidates(values, items, scores, words, offset, axis):
    """Returns the best with all scores whose bits are set, of equals the first ones; most bits first, CHUNK lines each.

    values, items: (k, lines). scores: (B, T). words: as `_pack`'s high halves.
    """
    lines, size = values.shape[1], words.shape[axis]
    counts = _total(lax.population_count(words).astype(jnp.int32), axis)  # (lines,)
    order = _order(-counts)
    places = _order(order)  # of the lines in it
    chunk = min(CHUNK, lines)
    order = jnp.pad(order, (0, -lines % chunk), mode="edge")
    filled = jnp.moveaxis(words != 0, axis, 0)  # (W, lines)
    groups = -(-size // 32)
    filled = jnp.pad(filled, ((0, groups * 32 - size), (0, 0))).reshape(32, groups, lines)
    summary = sum(jnp.where(filled[bit], np.uint32(1 << bit), np.uint32(0)) for bit in range(32))  # (groups, lines)

    def take(array, along, line):
        return array[line, along] if axis else array[along, line]

    def look(number, best):
        line = lax.dynamic_slice_in_dim(order, number * chunk, chunk)

        def turn(_, carry):
            values, items, summary, word, bits = carry
            group = jnp.argmax(summary != 0, axis=0)  # (chunk,)
            rest = jnp.take_along_axis(summary, group[None], axis=0)[0]
            following = group + groups * _lowest(rest)
            following = jnp.minimum(following, size - 1)
            empty = bits == 0
            taken = empty & (jnp.arange(groups)[:, None] == group)
            summary = jnp.where(taken, rest & (rest - np.uint32(1)), summary)
            word = jnp.where(empty, following, word)
            bits = jnp.where(empty, jnp.where(rest != 0, take(words, following, line), np.uint32(0)), bits)
            place = jnp.minimum(word + size * _lowest(bits), WORD * size - 1)
            score = jnp.where(bits != 0, take(scores, place, line), -jnp.inf)
            item = jnp.where(bits != 0, offset + place, _NOWHERE)
            values, items = _insert(values, items, score, item)
            return values, items, summary, word, bits & (bits - np.uint32(1))

        nothing = jnp.zeros(chunk, jnp.int32), jnp.zeros(chunk, jnp.uint32)
        lists = (lax.dynamic_slice_in_dim(part, number * chunk, chunk, axis=1) for part in best)
        found = lax.fori_loop(0, counts[line[0]], turn, (*lists, summary[:, line], *nothing))
        return tuple(
            lax.dynamic_update_slice_in_dim(part, f, number * chunk, axis=1)
            for part, f in zip(best, found[:2], strict=True)
        )

    chunks = (jnp.sum(counts > 0, dtype=jnp.int32) + chunk - 1) // chunk
    # Taken in that order and put back whole: what XLA makes of a scatter is a turn for each line.
    ordered = (
        jnp.pad(part[:, order], ((1, 0), (0, 0)), constant_values=first)
        for part, first in zip((values, items), _FIRST, strict=True)
    )
    return tuple(part[1:, places] for part in lax.fori_loop(0, chunks, look, tuple(ordered)))


def _order(numbers):
    """Returns the indices that sort (N,) int32 numbers, equal ones as they stand; N times each has to be an int32."""
    size = len(numbers)
    return lax.sort(numbers * size + jnp.arange(size, dtype=jnp.int32)) % size  # a single operand sorts faster


def _lowest(bits):
    """Returns the number of the lowest set bit; 32 where none is."""
    return lax.population_count(~bits & (bits - np.uint32(1))).astype(jnp.int32)


def _insert(values, items, score, item):
    """Returns the lists (1 + k, lines), best first and of equals the first item, with one score more and the last less.

    Their first rows stand before every score, so that each other row has one above it. Concatenated last: XLA does not
    vectorise what reads a shifted list.
    """
    above = _before(values[:-1], items[:-1], score, item)
    stays = _before(values[1:], items[1:], score, item)
    values = jnp.concatenate([values[:1], jnp.maximum(values[1:], jnp.minimum(values[:-1], score))])
    items = jnp.concatenate([items[:1], jnp.where(stays, items[1:], jnp.where(above, item, items[:-1]))])
    return values, items


def _before(value, item, other_value, other_item):
    return (value > other_value) | ((value == other_value) & (item < other_item))
