"""Exact ranks of the relevant items, by counting; both directions come from one computation of the scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.ranking import kernel
from jaxclip.ranking.layout import PRECISIONS, TILE, Layout, orders
from jaxclip.ranking.relevance import Relevance

_SMALL = 256  # side of the small tiles that the relevant pairs' scores are first computed from


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of the relevant items, and the best items of each query.

    Attributes:
      ranks: (nnz,) int64, 1-based, aligned with `Relevance.indices`; distinct within a query.
      top_scores: (Q, k) float32, descending, NaN last.
      top_items: (Q, k) int64 gallery items; equal scores are in the order of `layout.orders`, which is by index if each
        query has one relevant item.
      nan_count: how many of the Q x G scores are NaN.
    """

    ranks: np.ndarray
    top_scores: np.ndarray
    top_items: np.ndarray
    nan_count: int


def make_mesh(queries: int = -1, gallery: int = 1) -> Mesh:
    """Returns all devices of all processes as a mesh of `queries` x `gallery`; the size -1 takes all others."""
    count = jax.device_count()
    sizes = (count // gallery if queries == -1 else queries, count // queries if gallery == -1 else gallery)
    return jax.make_mesh(sizes, kernel.AXES, axis_types=(AxisType.Auto,) * 2)


def ranks(queries, gallery, relevance: Relevance, **options: Any) -> Ranks:
    """Returns the rank of each relevant item for each query, and each query's best items; see `both_ways`."""
    return _search(queries, gallery, [relevance], **options)[0]


def both_ways(queries, gallery, relevance: Relevance, **options: Any) -> tuple[Ranks, Ranks]:
    """Returns the ranks of gallery items for queries, and of queries for gallery items, from one pass over the scores.

    Ties are pessimistic: a non-relevant item ranks above a relevant item with an equal score. Relevant items with equal
    scores rank by index. NaN scores rank below all others, and NaN scores of relevant items rank last.

    Args:
      queries: (Q, D) embeddings, normalised by the caller if cosines are meant.
      gallery: (G, D) embeddings.
      relevance: the relevant items of the Q queries; its transpose gives the relevant queries of the G items.
      top_k: how many best items to return for each query and each item; fewer if there are not that many.
      tile: the largest number of queries and of gallery items in a tile. Memory besides the embeddings: one copy of the
        gallery, a few tiles of floats, 8 bytes for each of the best.
      products: the precision of the scores, a key of `layout.PRECISIONS`; all are summed in float32. "bfloat16" rounds
        the embeddings. "bfloat16_3x" errs by less than 2^-16 of the product of both vectors' lengths, and is faster
        than "float32" where bfloat16 products are more than three times as fast (TPUs, processors with AMX).
      mesh: from `make_mesh`; default: all devices along the queries. The result does not depend on it.
      progress: wraps the sequence of query blocks, for a progress bar.

    Raises:
      ValueError: the shapes or the relevance do not match; an item is relevant to no query; `products` is no key of
        PRECISIONS; or embeddings are not finite with "bfloat16_3x".
    """
    forth, back = _search(queries, gallery, [relevance, relevance.transpose(len(gallery))], **options)
    return forth, back


def _search(
    queries,
    gallery,
    directions: Sequence[Relevance],
    *,
    top_k: int = 0,
    tile: int = TILE,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Ranks]:
    """Returns the ranks in each direction: items for queries, then queries for items if a second relevance is given."""
    relevance, reverse = directions[0], directions[1] if len(directions) > 1 else None
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    _check(queries, gallery, relevance)
    if products not in PRECISIONS:
        raise ValueError(f"products = {products!r} is none of {', '.join(PRECISIONS)}")
    mesh = make_mesh() if mesh is None else mesh
    least = kernel.WORD * min(top_k, max(len(queries), len(gallery)))
    sides = [
        Layout(embeddings, order, shards, least, max(tile, least), parts)
        for embeddings, order, shards, parts in zip(
            (queries, gallery),
            orders(relevance, reverse, len(gallery)),
            mesh.devices.shape,
            PRECISIONS[products],
            strict=True,
        )
    ]
    slots = sides[0].slots()[relevance.rows], sides[1].slots()[relevance.indices]  # (nnz,) each
    within = [np.arange(len(slots[0])) - relevance.indptr[relevance.rows], np.zeros(len(slots[0]), np.int64)]
    if reverse is not None:
        turned = np.argsort(relevance.indices, kind="stable")
        within[1][turned] = np.arange(len(turned)) - reverse.indptr[reverse.rows]
    ks = min(top_k, len(gallery)), min(top_k, len(queries)) if reverse is not None else 0
    finite = _all_finite(queries, gallery)
    if products == "bfloat16_3x" and not finite:
        raise ValueError(f'products = "{products}" needs finite embeddings and finite scores')
    sweep = _Sweep(mesh, sides, slots, within, ks, back=reverse is not None, finite=finite)
    # The thresholds must equal the scores of the pass to the bit. On CPUs small tiles give the same bits as large ones.
    # The pass returns the pairs' scores that it saw; if they differ, it runs again with them.
    scores = _guess(sides, slots, finite)
    with jax.set_mesh(mesh):  # the caller's mesh may have other axes
        found = sweep.run(scores, progress)
        while not np.array_equal(found.scores, scores):
            scores = found.scores
            found = sweep.run(scores, progress)
    forth = _result(scores, found.rows, relevance, sides[1].order, found.nans)
    if reverse is None:
        return [forth]
    columns = (found.columns[0][turned], *found.columns[1:])
    return [forth, _result(scores[turned], columns, reverse, sides[0].order, found.nans)]


@dataclass(frozen=True)
class _Found:
    """Result of a sweep.

    Attributes:
      scores: (nnz,) of the relevant pairs.
      rows: for queries, the pairs' counts (nnz,) and the best values and slots (Q, k) each.
      columns: the same for gallery items; equal to `rows` where only queries are ranked for.
      nans: number of NaN scores.
    """

    scores: np.ndarray
    rows: tuple[np.ndarray, np.ndarray, np.ndarray]
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]
    nans: int


class _Sweep:
    """One pass over all tiles: block after block, each shard of queries against each shard of the gallery."""

    def __init__(self, mesh, sides, slots, within, ks, *, back, finite):
        self.mesh, self.sides, self.slots, self.within, self.ks, self.back = mesh, sides, slots, within, ks, back
        self.visit = kernel.make_visit(mesh, blocks=sides[0].blocks, ks=ks, back=back, finite=finite)

    def run(self, scores: np.ndarray, progress) -> _Found:
        """Returns the result of the pass with `scores` (nnz,) as the relevant pairs' thresholds."""
        rows, columns = self.sides
        (across, blocks, _), (along, per_shard, _) = rows.shape, columns.shape
        count = along * per_shard  # tiles of the gallery
        row_limits, row_widths = rows.thresholds(self.slots[0], self.within[0], scores)
        column_limits, column_widths = columns.thresholds(self.slots[1], self.within[1], scores)
        shard, block_of, row = np.unravel_index(self.slots[0], rows.shape)
        tile_of, column = np.divmod(self.slots[1], columns.tile)
        a, c, ac = P(kernel.AXES[0]), P(kernel.AXES[1]), P(*kernel.AXES)
        gallery = self._place((count, columns.tile), c, columns, lambda tile: tile[0].indices(count)[0] * columns.tile)
        column_thresholds = kernel.Thresholds(
            *(self._host(part.reshape(count, *part.shape[2:]), c) for part in (column_limits, column_widths))
        )
        state = kernel.empty_state(self.mesh, across, count, column_limits.shape[2], columns.tile, self.ks[1])
        seen, parts = np.empty_like(scores), []
        for block in progress(range(blocks)):
            mine = np.flatnonzero(block_of == block)
            cell = shard[mine] * count + tile_of[mine]
            spot = _numbered(cell)
            spots = np.zeros((across, count, 1 << int(spot.max(initial=63)).bit_length(), 2), np.int32)
            spots.reshape(across * count, -1, 2)[cell, spot] = np.stack([row[mine], column[mine]], axis=1)
            state, *found = self.visit(
                np.int32(block),
                np.array([len(rows.order), len(columns.order)], np.int32),
                self._place((across, rows.tile), a, rows, lambda s, b=block: self._first_slot(s, b)),
                gallery,
                kernel.Thresholds(self._host(row_limits[:, block], a), row_widths[:, block].max()),
                column_thresholds,
                self._host(spots, ac),
                state,
            )
            counts, values, items, scores_seen, nans = map(_fetch, found)
            seen[mine] = scores_seen.reshape(across * count, -1)[cell, spot]
            parts.append((counts.sum(axis=1), values, items, int(nans.sum(dtype=np.int64))))
        del gallery, column_thresholds  # free their memory before the results are gathered
        counts, values, items, nans = zip(*parts, strict=True)
        # (A, blocks, R, B), then by slot; a line's best are concatenated over the shards of the gallery.
        by_slot = np.stack(counts, axis=1).swapaxes(2, 3).reshape(rows.shape[0] * blocks * rows.tile, -1)
        best = [np.stack(p, axis=1).transpose(0, 1, 4, 2, 3).reshape(len(by_slot), -1) for p in (values, items)]
        found_rows = by_slot[self.slots[0], self.within[0]], *_best(*best, rows.order, self.ks[0])
        if not self.back:
            return _Found(seen, found_rows, found_rows, sum(nans))
        counts, values, items = map(_fetch, state)
        by_slot = counts.sum(axis=0).swapaxes(1, 2).reshape(count * columns.tile, -1)
        best = [p.transpose(1, 3, 0, 2).reshape(len(by_slot), -1) for p in (values, items)]
        found_columns = by_slot[self.slots[1], self.within[1]], *_best(*best, columns.order, self.ks[1])
        return _Found(seen, found_rows, found_columns, sum(nans))

    def _first_slot(self, index, block: int) -> int:
        shards, blocks, tile = self.sides[0].shape
        return (index[0].indices(shards)[0] * blocks + block) * tile

    def _place(self, shape: tuple[int, int], spec: P, side: Layout, first: Callable) -> jax.Array:
        """Returns the global array (*shape, width); its part at an index has the lines from slot first(index) on."""

        def part(index):
            start, stop, _ = index[0].indices(shape[0])
            return side.lines(first(index), (stop - start) * shape[1]).reshape(stop - start, shape[1], -1)

        whole = (*shape, side.width)
        return jax.make_array_from_callback(whole, NamedSharding(self.mesh, spec), part)

    def _host(self, array: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), array.__getitem__)


def _fetch(array: jax.Array) -> np.ndarray:
    """Returns the whole array, on every process."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def _numbered(cells: np.ndarray) -> np.ndarray:
    """Returns for each entry how many equal entries precede it."""
    order = np.argsort(cells, kind="stable")
    ordered = cells[order]
    numbers = np.empty(len(cells), np.int64)
    numbers[order] = np.arange(len(cells)) - np.searchsorted(ordered, ordered)
    return numbers


def _best(values, items, order, k):
    """Returns each line's k best values and their slots, (lines, k) each.

    Args:
      values, items: (slots, n * k), n sorted lists for each slot.
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


def _guess(sides, slots, finite) -> np.ndarray:
    """Returns (nnz,) the scores of the relevant pairs, computed in small tiles that contain them."""
    tile_of, place = zip(*(np.divmod(s, _SMALL) for s in slots), strict=True)
    number = tile_of[0] * (1 + tile_of[1].max()) + tile_of[1]
    order = np.argsort(number, kind="stable")
    scores = np.empty(len(number), np.float32)
    for some in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
        parts = (side.lines(tile[some[0]] * _SMALL, _SMALL) for side, tile in zip(sides, tile_of, strict=True))
        scores[some] = np.asarray(kernel.product_keys(*parts, finite=finite))[place[0][some], place[1][some]]
    return scores


def _all_finite(queries, gallery) -> bool:
    """Returns whether no product of these embeddings can be infinite or NaN."""
    largest = [max(side.max(initial=0.0), -side.min(initial=0.0)) for side in (queries, gallery)]
    return bool(np.isfinite(largest).all() and float(largest[0]) * float(largest[1]) * queries.shape[1] < 1e38)


def _result(scores, found, relevance, order, nans):
    counts, values, slots = found
    values = np.where(values == kernel.NAN, np.nan, np.where(values == kernel.MINUS_INFINITY, -np.inf, values))
    ranks = order_relevant(scores, counts, relevance)
    return Ranks(ranks, values.astype(np.float32), order[slots].astype(np.int64), nans)


def order_relevant(scores: np.ndarray, at_or_above: np.ndarray, relevance: Relevance) -> np.ndarray:
    """Returns (nnz,) ranks from the pairs' scores and the counts of scores at or above each of them.

    The counts include the query's other relevant items; this function orders these by score, ties by index.
    """
    rows = relevance.rows
    order = np.lexsort((relevance.indices, -scores, rows))  # (nnz,)
    score, row = scores[order], rows[order]
    tied = (row[1:] == row[:-1]) & (score[1:] == score[:-1])
    ends = np.flatnonzero(np.append(~tied, True)) + 1  # where each run of equal scores of one query ends
    run = np.cumsum(np.append(0, ~tied))[: len(order)]
    relevant_at_or_above = ends[run] - relevance.indptr[row]
    position = np.arange(len(order)) - relevance.indptr[row]
    result = np.empty(len(order), np.int64)
    result[order] = at_or_above[order] - relevant_at_or_above + position + 1
    return result


def _check(queries, gallery, relevance):
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or not len(gallery):
        raise ValueError(f"embeddings (Q, D) and (G, D) expected, got {queries.shape} and {gallery.shape}")
    if len(relevance.indptr) != len(queries) + 1 or (relevance.indices >= len(gallery)).any():
        raise ValueError(f"the relevance does not fit {len(queries)} queries and {len(gallery)} gallery items")
