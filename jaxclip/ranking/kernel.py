"""The kernel of `ranks`: scores one block of queries against the gallery, tile by tile, and counts and selects scores.

What is counted and selected of a tile is defined in `selection`; `cpu_selection` has a faster form for CPUs.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.ranking import cpu_selection, selection
from jaxclip.ranking.selection import NOWHERE, Thresholds
from jaxclip.runtime import compiler

AXES = ("queries", "gallery")
MULTIPLE = 64  # every side of a tile is a multiple of this
# If a shard has several tiles and `Layout.max_tile` is at least 2 * VECTORS, the sides of the tiles are multiples of
# VECTORS, so that on CPUs each of the parts that are packed into words fills whole vector registers, and on TPUs the
# scores of a line fill whole tiles of the memory's layout.
VECTORS = 256
# Numbers that replace scores of -inf (and any score below -3.2e38) and scores that are NaN. They sort below all other
# scores, and NaN below -inf. Padding is -inf itself, below both.
MINUS_INFINITY, NAN = np.float32(-3.2e38), np.float32(-3.3e38)
State = tuple[jax.Array, jax.Array, jax.Array]


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


def best_of(scores, segments):
    """Returns (B, T) the highest score of each product's pictures, from the scores (B, S) at a tile's places.

    `segments` are those of `pictures.PictureLayout`.
    """
    first, parts = 0, []
    for pictures, products in segments:
        end = first + pictures * products
        parts.append(scores[:, first:end].reshape(-1, pictures, products).max(axis=1))
        first = end
    return jnp.concatenate(parts, axis=1)


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
    items = np.full(values.shape, NOWHERE)
    sharding = NamedSharding(mesh, P(*AXES))
    return tuple(jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in (counts, values, items))


def make_visit(
    mesh: Mesh,
    *,
    blocks: int,
    ks: tuple[int, int],
    back: bool,
    finite: bool,
    segments: tuple[tuple[int, int], ...] | None = None,
):
    """Returns the compiled function that scores one block of queries of each shard against all tiles of the gallery.

    A is the number of shards of queries, C that of shards of the gallery; a block has B queries; all shards of the
    gallery together have N tiles of T items; a line has D factors, a row R and a column V thresholds. If the items are
    products with several pictures, a tile has S places for pictures; else S = T. Its arguments:
      block, sizes: index of the block; counts of queries and of gallery items, beyond which all lines are padding.
      queries, gallery: (A, B, D), (N, S, D).
      row_thresholds, column_thresholds: limits (A, R, B), width a scalar; limits (N, V, T), width (N,).
      spots: (A, N, U, 2) row and column, within each tile, of the U scores to return. A pair of such arrays has in the
        second the row and place of each score that is left out; rows of B or more leave out none.
      state: the columns' state, from `empty_state` or the previous block; donated.
    It returns the new state, the rows' counts (A, C, R, B), the rows' k best values and their items, (A, C, k, B) each,
    the scores at the spots (A, N, U), and the number of NaN scores (A, C), 0 if `finite`.

    Args:
      mesh: a mesh with the axes "queries" and "gallery".
      blocks: number of blocks in each shard of queries.
      ks: the numbers of best scores to keep for each row and for each column.
      back: whether to rank queries for gallery items (the columns) too.
      finite: whether every score is certain to be finite.
      segments: those of `pictures.PictureLayout`; None = items have one place each.
    """
    return _make_visit(mesh, blocks, ks, back, finite, segments, compiler.backend())


@cache
def _make_visit(mesh: Mesh, blocks: int, ks: tuple[int, int], back: bool, finite: bool, segments, backend: str):
    """Returns the function of `make_visit` for a back end; the back end is only a key of the cache."""
    form = cpu_selection if compiler.has_form("count_and_select") else selection

    def visit(block, sizes, queries, gallery, row_thresholds, column_thresholds, spots, state):
        (row_limits, row_width), (column_limits, column_widths) = row_thresholds, column_thresholds
        # The first axis, over the shards of queries, has only the entry of this device's shard.
        queries, row_thresholds = queries[0], Thresholds(row_limits[0], row_width)
        spots, *hidden = [part[0] for part in jax.tree.leaves(spots)]
        (rows, _), (count, columns, _) = queries.shape, gallery.shape
        if segments:
            columns = sum(products for _, products in segments)
        first_row = (lax.axis_index("queries") * blocks + block) * rows
        best = jnp.full((ks[0], rows), -jnp.inf), jnp.full((ks[0], rows), NOWHERE)
        spot_scores = jnp.zeros(spots.shape[:2], jnp.float32)
        counts = jnp.zeros(row_limits.shape[1:], jnp.int32)
        start = counts, best, spot_scores, jnp.int32(0), tuple(part[0] for part in state)

        def step(number, carry):
            row_counts, best, spot_scores, nans, state = carry
            first_column = (lax.axis_index("gallery") * count + number) * columns
            scores = product(queries, gallery[number])  # (B, T)
            real = (first_row + jnp.arange(rows) < sizes[0])[:, None] & (first_column + jnp.arange(columns) < sizes[1])
            scores = keys(scores, finite=finite)
            for left_out in hidden:  # as padding
                scores = scores.at[left_out[number, :, 0], left_out[number, :, 1]].set(-jnp.inf, mode="drop")
            if segments:
                scores = best_of(scores, segments)
            if not finite:
                nans += jnp.sum((scores == NAN) & real, dtype=jnp.int32)
            has_padding = (first_row + rows > sizes[0]) | (first_column + columns > sizes[1])
            scores = form.mask(scores, real, has_padding)
            spot_scores = spot_scores.at[number].set(scores[spots[number, :, 0], spots[number, :, 1]])
            counted, best = form.count_and_select(scores, row_thresholds, best, number == 0, first_column, axis=1)
            row_counts += counted
            if back:
                old_counts, *old_best = [part[number] for part in state]
                thresholds = Thresholds(column_limits[number], column_widths[number])
                counted, column_best = form.count_and_select(
                    scores, thresholds, old_best, block == 0, first_row, axis=0
                )
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


@partial(jax.jit, static_argnames="finite")
def scores_at(queries, gallery, spots, *, finite: bool):
    """Returns (S,) the `keys` of the scores at spots (S, 2), a row and a column each, of one tile (B, D) x (T, D)."""
    return product_keys(queries, gallery, finite=finite)[spots[:, 0], spots[:, 1]]
