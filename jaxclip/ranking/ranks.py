"""Exact ranks of relevant items for queries and, from the same scores, of queries for items; by counting."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.ranking import kernel
from jaxclip.ranking.layout import PRECISIONS, TILE, Layout, orders
from jaxclip.ranking.relevance import Relevance, order_relevant
from jaxclip.runtime.mesh import mesh_of

_SMALL_TILE = 256  # side of the tiles from which the relevant pairs' scores are first computed


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of the relevant items, and the k best items of each query.

    If queries are ranked for gallery items, the items take the place of the Q queries here, and the queries that of
    the G items.

    Attributes:
      ranks: (nnz,) int64, 1-based, one per relevant pair, aligned with `Relevance.indices`; distinct within a query.
      top_scores: (Q, k) float32, descending, NaN last.
      top_items: (Q, k) int64 gallery items; items with equal scores are in the order of `layout.orders`. In results of
        `ranks` (not of `both_ways`) that is the order of their indices if each query has one relevant item.
      nan_count: the number of NaN among the Q x G scores.
    """

    ranks: np.ndarray
    top_scores: np.ndarray
    top_items: np.ndarray
    nan_count: int


def make_mesh(queries: int = -1, gallery: int = 1) -> Mesh:
    """Returns all devices of all processes as a mesh of `queries` x `gallery`; -1 means as many as fit."""
    count = jax.device_count()
    sizes = (count // gallery if queries == -1 else queries, count // queries if gallery == -1 else gallery)
    return mesh_of(dict(zip(kernel.AXES, sizes, strict=True)))


def ranks(
    queries,
    gallery,
    relevance: Relevance,
    *,
    top_k: int = 0,
    tile: int = TILE,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Ranks:
    """Returns the rank of each relevant item for each query, and each query's best items.

    The arguments are those of `both_ways`, but an item may be relevant to no query.
    """
    return _search(
        queries, gallery, [relevance], top_k=top_k, tile=tile, products=products, mesh=mesh, progress=progress
    )[0]


def both_ways(
    queries,
    gallery,
    relevance: Relevance,
    *,
    top_k: int = 0,
    tile: int = TILE,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Ranks, Ranks]:
    """Returns the ranks of gallery items for queries, and of queries for gallery items, from the same scores.

    Ties are pessimistic: a non-relevant item ranks above a relevant item with an equal score. Relevant items with equal
    scores rank by index. NaN scores rank below all others, and NaN scores of relevant items rank last.

    Args:
      queries: (Q, D) embeddings, normalised by the caller if the scores are to be cosines.
      gallery: (G, D) embeddings.
      relevance: the relevant items of the Q queries; its transpose gives the relevant queries of the G items.
      top_k: the number of best items to return for each query, and of best queries for each item; fewer if there are
        fewer.
      tile: the largest number of queries and of gallery items in a tile; it is raised to 16 * `top_k` if it is smaller,
        and rounded as in `Layout.tile`. In addition to the embeddings, each device needs memory mainly for its shard of
        the gallery, a few tiles of floats, and 8 bytes for each of the best scores.
      products: the precision of the scores, a key of `layout.PRECISIONS`; all are summed in float32. "bfloat16" rounds
        the embeddings. A score of "bfloat16_3x" has an error of less than 2^-16 of the product of both vectors'
        lengths, apart from the error of its sum; it is faster than "float32" where bfloat16 products are more than
        three times as fast (TPUs, processors with AMX).
      mesh: from `make_mesh`; default: all devices along the queries. It changes the result by rounding at most.
      progress: wraps the indices of the query blocks in each pass over the scores, for a progress bar.

    Raises:
      ValueError: the shapes or the relevance do not match; an item is relevant to no query; `products` is not a key of
        PRECISIONS; or, with "bfloat16_3x", embeddings are not finite or so large that a score might not be finite.
    """
    directions = [relevance, relevance.transpose(len(gallery))]
    forth, back = _search(
        queries, gallery, directions, top_k=top_k, tile=tile, products=products, mesh=mesh, progress=progress
    )
    return forth, back


def _search(
    queries,
    gallery,
    directions: Sequence[Relevance],
    *,
    top_k: int,
    tile: int,
    products: str,
    mesh: Mesh | None,
    progress: Callable[[Iterable], Iterable],
) -> list[Ranks]:
    """Returns the ranks in each direction: items for queries, then queries for items if a second relevance is given."""
    relevance, reverse = directions[0], directions[1] if len(directions) > 1 else None
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    _check(queries, gallery, relevance)
    if products not in PRECISIONS:
        raise ValueError(f"products = {products!r} must be one of {', '.join(PRECISIONS)}")
    mesh = make_mesh() if mesh is None else mesh
    min_tile = kernel.WORD * min(top_k, max(len(queries), len(gallery)))
    layouts = [
        Layout(embeddings, order, shards, min_tile, max(tile, min_tile), parts)
        for embeddings, order, shards, parts in zip(
            (queries, gallery),
            orders(relevance, reverse, len(gallery)),
            mesh.devices.shape,
            PRECISIONS[products],
            strict=True,
        )
    ]
    # For each relevant pair: the slots of its query and item, and its index among its query's pairs and among its
    # item's pairs (0 if queries are not ranked for items).
    slots = layouts[0].slots()[relevance.rows], layouts[1].slots()[relevance.indices]  # (nnz,) each
    pair_numbers = [np.arange(len(slots[0])) - relevance.indptr[relevance.rows], np.zeros(len(slots[0]), np.int64)]
    if reverse is not None:
        by_item = np.argsort(relevance.indices, kind="stable")  # the pairs in the order of `reverse`
        pair_numbers[1][by_item] = np.arange(len(by_item)) - reverse.indptr[reverse.rows]
    ks = min(top_k, len(gallery)), min(top_k, len(queries)) if reverse is not None else 0
    finite = _all_finite(queries, gallery)
    if products == "bfloat16_3x" and not finite:
        raise ValueError(
            f'the precision of dot products, products = "{products}", needs finite embeddings, none so large that a '
            'score could overflow: use "float32"'
        )
    sweep = _Sweep(mesh, layouts, slots, pair_numbers, ks, back=reverse is not None, finite=finite)
    # A pair's threshold must be bit for bit the score that the sweep computes for it. On CPUs small tiles give the same
    # bits as large ones. The sweep returns the pairs' scores that it computed; while they differ from the thresholds,
    # they become the thresholds of another sweep.
    scores = _initial_scores(layouts, slots, finite)
    with jax.set_mesh(mesh):  # replaces the mesh that the calling code may have set, whose axes may be others
        swept = sweep.run(scores, progress)
        while not np.array_equal(swept.scores, scores):
            scores = swept.scores
            swept = sweep.run(scores, progress)
    forth = _result(scores, swept.rows, relevance, layouts[1].order, swept.nan_count)
    if reverse is None:
        return [forth]
    columns = (swept.columns[0][by_item], *swept.columns[1:])
    return [forth, _result(scores[by_item], columns, reverse, layouts[0].order, swept.nan_count)]


@dataclass(frozen=True)
class _SweepResult:
    """The result of a sweep.

    Attributes:
      scores: (nnz,) the scores of the relevant pairs.
      rows: for the queries: how many of a query's scores are at or above that of each of its pairs (nnz,), and each
        query's best scores and the slots of their items, (Q, k) each.
      columns: the same for the gallery items; equal to `rows` if queries are not ranked for items.
      nan_count: number of NaN scores.
    """

    scores: np.ndarray
    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]
    nan_count: int


class _Sweep:
    """Passes over all tiles: block by block, each device scores its queries against its shard of the gallery.

    Args:
      mesh: the devices.
      layouts: of the queries (the rows of a tile) and of the gallery (its columns).
      slots: for each layout, (nnz,) the slot of each relevant pair's line.
      pair_numbers: for each layout, (nnz,) the index of each pair among the pairs of its line.
      ks: the number of best scores to keep for each row and for each column.
      back: whether to rank queries for gallery items too.
      finite: whether every score is certain to be finite.
    """

    def __init__(self, mesh, layouts, slots, pair_numbers, ks, *, back, finite):
        self.mesh, self.layouts, self.ks, self.back = mesh, layouts, ks, back
        self.slots, self.pair_numbers = slots, pair_numbers
        self.visit = kernel.make_visit(mesh, blocks=layouts[0].blocks, ks=ks, back=back, finite=finite)

    def run(self, scores: np.ndarray, progress) -> _SweepResult:
        """Returns the result of a sweep with `scores` (nnz,) as the relevant pairs' thresholds."""
        rows, columns = self.layouts
        (query_shards, blocks, _), (gallery_shards, tiles_per_shard, _) = rows.shape, columns.shape
        tiles = gallery_shards * tiles_per_shard
        row_limits, row_widths = rows.thresholds(self.slots[0], self.pair_numbers[0], scores)
        column_limits, column_widths = columns.thresholds(self.slots[1], self.pair_numbers[1], scores)
        shard, block_numbers, row = np.unravel_index(self.slots[0], rows.shape)
        tile_numbers, column = np.divmod(self.slots[1], columns.tile)
        by_query, by_item, by_both = P(kernel.AXES[0]), P(kernel.AXES[1]), P(*kernel.AXES)

        def first_slot(index):
            return index[0].indices(tiles)[0] * columns.tile

        gallery = self._place_lines((tiles, columns.tile), by_item, columns, first_slot)
        column_thresholds = kernel.Thresholds(
            *(self._place(part.reshape(tiles, *part.shape[2:]), by_item) for part in (column_limits, column_widths))
        )
        state = kernel.empty_state(self.mesh, query_shards, tiles, column_limits.shape[2], columns.tile, self.ks[1])
        pair_scores, parts = np.empty_like(scores), []
        for block in progress(range(blocks)):
            pairs = np.flatnonzero(block_numbers == block)
            cell = shard[pairs] * tiles + tile_numbers[pairs]  # the tile of scores that contains each pair
            spot = _number_repeats(cell)
            spots = np.zeros((query_shards, tiles, 1 << int(spot.max(initial=63)).bit_length(), 2), np.int32)
            spots.reshape(query_shards * tiles, -1, 2)[cell, spot] = np.stack([row[pairs], column[pairs]], axis=1)
            state, *block_result = self.visit(
                np.int32(block),
                np.array([len(rows.order), len(columns.order)], np.int32),
                self._place_lines(
                    (query_shards, rows.tile), by_query, rows, lambda index, block=block: self._first_slot(index, block)
                ),
                gallery,
                kernel.Thresholds(self._place(row_limits[:, block], by_query), row_widths[:, block].max()),
                column_thresholds,
                self._place(spots, by_both),
                state,
            )
            counts, values, items, spot_scores, nan_counts = map(_fetch, block_result)
            pair_scores[pairs] = spot_scores.reshape(query_shards * tiles, -1)[cell, spot]
            parts.append((counts.sum(axis=1), values, items, int(nan_counts.sum(dtype=np.int64))))
        del gallery, column_thresholds  # free their memory before the results are gathered
        counts, values, items, nan_counts = zip(*parts, strict=True)
        # One row per slot of the queries; each query's best are concatenated over the shards of the gallery.
        by_slot = np.stack(counts, axis=1).swapaxes(2, 3).reshape(rows.shape[0] * blocks * rows.tile, -1)
        best = [np.stack(p, axis=1).transpose(0, 1, 4, 2, 3).reshape(len(by_slot), -1) for p in (values, items)]
        row_result = by_slot[self.slots[0], self.pair_numbers[0]], *_merge_best(*best, rows.order, self.ks[0])
        if not self.back:
            return _SweepResult(pair_scores, row_result, row_result, sum(nan_counts))
        counts, values, items = map(_fetch, state)
        by_slot = counts.sum(axis=0).swapaxes(1, 2).reshape(tiles * columns.tile, -1)
        best = [p.transpose(1, 3, 0, 2).reshape(len(by_slot), -1) for p in (values, items)]
        column_result = by_slot[self.slots[1], self.pair_numbers[1]], *_merge_best(*best, columns.order, self.ks[1])
        return _SweepResult(pair_scores, row_result, column_result, sum(nan_counts))

    def _first_slot(self, index, block: int) -> int:
        """Returns the first slot of a block of the shard of queries that `index` selects."""
        shards, blocks, tile = self.layouts[0].shape
        return (index[0].indices(shards)[0] * blocks + block) * tile

    def _place_lines(self, shape: tuple[int, int], spec: P, layout: Layout, first: Callable) -> jax.Array:
        """Returns the factors as a global array (*shape, width); the part at an index starts with slot first(index)."""

        def part(index):
            start, stop, _ = index[0].indices(shape[0])
            return layout.lines(first(index), (stop - start) * shape[1]).reshape(stop - start, shape[1], -1)

        whole = (*shape, layout.width)
        return jax.make_array_from_callback(whole, NamedSharding(self.mesh, spec), part)

    def _place(self, array: np.ndarray, spec: P) -> jax.Array:
        """Returns the array on the devices, sharded by `spec`."""
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), array.__getitem__)


def _fetch(array: jax.Array) -> np.ndarray:
    """Returns the whole array on every process."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def _number_repeats(cells: np.ndarray) -> np.ndarray:
    """Returns for each entry the number of equal entries before it."""
    order = np.argsort(cells, kind="stable")
    ordered = cells[order]
    numbers = np.empty(len(cells), np.int64)
    numbers[order] = np.arange(len(cells)) - np.searchsorted(ordered, ordered)
    return numbers


def _merge_best(values, items, order, k):
    """Returns each line's k best values and their items, (lines, k) each; items are given as slots of the other layout.

    Args:
      values, items: (slots, n * k), n sorted lists of k for each slot, one from each shard of the other layout.
      order: (lines,) the line in each slot.
    """
    lines = np.empty(len(order), np.int64)
    lines[order] = np.arange(len(order))
    values, items = values[lines], items[lines]
    if values.shape[1] == k:
        return values, items
    by_item = np.argsort(items, axis=1, kind="stable")
    values, items = np.take_along_axis(values, by_item, axis=1), np.take_along_axis(items, by_item, axis=1)
    by_value = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, by_value, axis=1), np.take_along_axis(items, by_value, axis=1)


def _initial_scores(layouts, slots, finite) -> np.ndarray:
    """Returns (nnz,) the scores of the relevant pairs, computed from the small tiles that contain them."""
    tile_of, place = zip(*(np.divmod(side_slots, _SMALL_TILE) for side_slots in slots), strict=True)
    tile_number = tile_of[0] * (1 + tile_of[1].max()) + tile_of[1]
    order = np.argsort(tile_number, kind="stable")
    scores = np.empty(len(tile_number), np.float32)
    for group in np.split(order, np.flatnonzero(np.diff(tile_number[order])) + 1):
        starts = [tile[group[0]] * _SMALL_TILE for tile in tile_of]
        parts = [layout.lines(start, _SMALL_TILE) for layout, start in zip(layouts, starts, strict=True)]
        scores[group] = np.asarray(kernel.product_keys(*parts, finite=finite))[place[0][group], place[1][group]]
    return scores


def _all_finite(queries, gallery) -> bool:
    """Returns whether the largest entries show that every score of these embeddings is finite."""
    largest = [max(side.max(initial=0.0), -side.min(initial=0.0)) for side in (queries, gallery)]
    return bool(np.isfinite(largest).all() and float(largest[0]) * float(largest[1]) * queries.shape[1] < 1e38)


def _result(scores, swept, relevance, order, nan_count):
    """Returns one direction's ranks; `order` maps the slots of the best items to the items."""
    counts, values, slots = swept
    values = np.where(values == kernel.NAN, np.nan, np.where(values == kernel.MINUS_INFINITY, -np.inf, values))
    ranks = order_relevant(scores, counts, relevance)
    return Ranks(ranks, values.astype(np.float32), order[slots].astype(np.int64), nan_count)


def _check(queries, gallery, relevance):
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or not len(gallery):
        raise ValueError(f"embeddings (Q, D) and (G, D), G > 0, expected, got {queries.shape} and {gallery.shape}")
    if len(relevance.indptr) != len(queries) + 1 or (relevance.indices >= len(gallery)).any():
        raise ValueError(f"the relevance does not fit {len(queries)} queries and {len(gallery)} gallery items")
