"""Passes over all scores of queries and gallery, block by block on the devices, without waiting for each block."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxclip.ranking import kernel
from jaxclip.ranking.layout import Layout
from jaxclip.ranking.selection import Thresholds
from jaxclip.runtime import compiler

SMALL_TILE = 256  # side of the tiles from which CPUs first compute the relevant pairs' scores


def initial_scores(layouts, places, finite) -> np.ndarray:
    """Returns (nnz,) the scores of pairs of a query and an item's picture, computed from the tiles that contain them.

    CPUs compute small tiles, other devices those of the sweep; they are started one after the other and fetched at the
    end. `places` are, for each layout, (nnz,) the place of each pair's row.
    """
    sides = [SMALL_TILE if compiler.on_cpu() else layout.places for layout in layouts]
    tile_of, place = zip(*(np.divmod(spot, side) for spot, side in zip(places, sides, strict=True)), strict=True)
    tile_number = tile_of[0] * (1 + tile_of[1].max()) + tile_of[1]
    order = np.argsort(tile_number, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(tile_number[order])) + 1)
    spots = np.zeros((max(SMALL_TILE, 1 << (max(map(len, groups)) - 1).bit_length()), 2), np.int32)
    found = []
    for group in groups:
        parts = [
            layout.lines(tile[group[0]] * side, side)
            for layout, tile, side in zip(layouts, tile_of, sides, strict=True)
        ]
        spots[: len(group)] = np.stack([part[group] for part in place], axis=1)
        found.append(kernel.scores_at(*parts, spots.copy(), finite=finite))
    scores = np.empty(len(tile_number), np.float32)
    for group, group_scores in zip(groups, jax.device_get(found), strict=True):
        scores[group] = group_scores[: len(group)]
    return scores


@dataclass(frozen=True)
class SweepResult:
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


class Pairs(NamedTuple):
    """The relevant pairs of a sweep.

    Attributes:
      slots: for each layout, (nnz,) the slot of each pair's line.
      numbers: for each layout, (nnz,) the index of each pair among the pairs of its line.
    """

    slots: Sequence[np.ndarray]
    numbers: Sequence[np.ndarray]


@dataclass(frozen=True, eq=False)
class _Spots:
    """Where scores are in the tiles of scores.

    Attributes:
      block: (n,) the block of each score's query.
      cell: (n,) its tile of scores within the block, counted over the shards of queries.
      row, column: (n,) its row and column or place in that tile.
      number: (n,) its number among those in the same tile.
      size: the first power of two above the largest number, at least 64, for all blocks: each size compiles a program.
    """

    block: np.ndarray
    cell: np.ndarray
    row: np.ndarray
    column: np.ndarray
    number: np.ndarray
    size: int

    @classmethod
    def of(cls, rows: Layout, columns: Layout, slots, places, *, side: int) -> "_Spots":
        """Returns the spots of slots (n,) of queries and slots or places (n,) of the gallery, `side` to a tile."""
        shard, block, row = np.unravel_index(slots, rows.shape)
        tile, column = np.divmod(places, side)
        tiles = columns.shards * columns.blocks
        cell = shard * tiles + tile
        number = _number_repeats(block * rows.shards * tiles + cell)
        return cls(block, cell, row, column, number, 1 << int(number.max(initial=63)).bit_length())

    def in_block(self, block: int, shape: tuple[int, int], empty: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Returns which spots are in a block, and (*shape, size, 2) their rows and columns in each tile.

        `shape` is the number of tiles, as (A, N) in `kernel.make_visit`; `empty` is the row of entries without a spot.
        """
        here = np.flatnonzero(self.block == block)
        spots = np.zeros((*shape, self.size, 2), np.int32)
        spots[..., 0] = empty
        entry = self.cell[here], self.number[here]
        spots.reshape(-1, self.size, 2)[entry] = np.stack([self.row[here], self.column[here]], axis=1)
        return here, spots


class Sweep:
    """Passes over all tiles: block by block, each device scores its queries against its shard of the gallery.

    Args:
      mesh: the devices.
      layouts: of the queries (the rows of a tile) and of the gallery (its columns).
      pairs: the relevant pairs.
      ks: the number of best scores to keep for each row and for each column.
      back: whether to rank queries for gallery items too.
      finite: whether every score is certain to be finite.
      hidden: the slots of queries and, for each, a place of the gallery whose score is left out; None = none.
    """

    def __init__(self, mesh, layouts, pairs: Pairs, ks, *, back, finite, hidden=None):
        self.mesh, self.layouts, self.ks, self.back = mesh, layouts, ks, back
        self.slots, self.pair_numbers = pairs
        rows, columns = layouts
        self.read = _Spots.of(rows, columns, *pairs.slots, side=columns.tile)
        self.hidden = _Spots.of(rows, columns, *hidden, side=columns.places) if hidden else None
        self.visit = kernel.make_visit(
            mesh, blocks=rows.blocks, ks=ks, back=back, finite=finite, segments=columns.segments
        )

    def run(self, scores: np.ndarray, progress) -> SweepResult:
        """Returns the result of a sweep with `scores` (nnz,) as the relevant pairs' thresholds."""
        rows, columns = self.layouts
        (query_shards, blocks, _), (gallery_shards, tiles_per_shard, _) = rows.shape, columns.shape
        tiles = gallery_shards * tiles_per_shard
        pair_scores, parts = np.empty_like(scores), []
        # The devices work on the next block while the results of one are fetched.
        for started in _delayed_by_one(self._dispatch(scores, progress)):
            pairs, place, result, state = started
            counts, values, items, spot_scores, nan_counts = _fetch(result)
            pair_scores[pairs] = spot_scores.reshape(query_shards * tiles, -1)[place]
            parts.append((counts.sum(axis=1), values, items, int(nan_counts.sum(dtype=np.int64))))
        counts, values, items, nan_counts = zip(*parts, strict=True)
        # One row per slot of the queries; each query's best are concatenated over the shards of the gallery.
        by_slot = np.stack(counts, axis=1).swapaxes(2, 3).reshape(rows.shape[0] * blocks * rows.tile, -1)
        best = [np.stack(p, axis=1).transpose(0, 1, 4, 2, 3).reshape(len(by_slot), -1) for p in (values, items)]
        row_result = by_slot[self.slots[0], self.pair_numbers[0]], *_merge_best(*best, rows.order, self.ks[0])
        if not self.back:
            return SweepResult(pair_scores, row_result, row_result, sum(nan_counts))
        counts, values, items = _fetch(state)
        by_slot = counts.sum(axis=0).swapaxes(1, 2).reshape(tiles * columns.tile, -1)
        best = [p.transpose(1, 3, 0, 2).reshape(len(by_slot), -1) for p in (values, items)]
        column_result = by_slot[self.slots[1], self.pair_numbers[1]], *_merge_best(*best, columns.order, self.ks[1])
        return SweepResult(pair_scores, row_result, column_result, sum(nan_counts))

    def _dispatch(self, scores: np.ndarray, progress) -> Iterator[tuple]:
        """Starts the work on each block, without waiting for it, and yields what it will give.

        That is: the pairs (P,) whose scores are in the block; for each, the tile (counted over the shards of queries)
        and the spot of its score among the scores at the spots; the results of `visit` but the state; and the state,
        which is deleted when the next block is started.
        """
        rows, columns = self.layouts
        query_shards, blocks, _ = rows.shape
        tiles = columns.shards * columns.blocks
        row_limits, row_widths = rows.thresholds(self.slots[0], self.pair_numbers[0], scores)
        column_limits, column_widths = columns.thresholds(self.slots[1], self.pair_numbers[1], scores)
        by_query, by_item, by_both = P(kernel.AXES[0]), P(kernel.AXES[1]), P(*kernel.AXES)

        def first_place(index):
            return index[0].indices(tiles)[0] * columns.places

        gallery = self._place_lines(tiles, by_item, columns, first_place)
        column_thresholds = Thresholds(
            *(self._place(part.reshape(tiles, *part.shape[2:]), by_item) for part in (column_limits, column_widths))
        )
        state = kernel.empty_state(self.mesh, query_shards, tiles, column_limits.shape[2], columns.tile, self.ks[1])
        for block in progress(range(blocks)):
            pairs, spots = self.read.in_block(block, (query_shards, tiles))
            spots = self._place(spots, by_both)
            if self.hidden:
                _, left_out = self.hidden.in_block(block, (query_shards, tiles), empty=rows.tile)
                spots = spots, self._place(left_out, by_both)
            state, *result = self.visit(
                np.int32(block),
                np.array([len(rows.order), len(columns.order)], np.int32),
                self._place_lines(
                    query_shards, by_query, rows, lambda index, block=block: self._first_slot(index, block)
                ),
                gallery,
                Thresholds(self._place(row_limits[:, block], by_query), row_widths[:, block].max()),
                column_thresholds,
                spots,
                state,
            )
            yield pairs, (self.read.cell[pairs], self.read.number[pairs]), result, state

    def _first_slot(self, index, block: int) -> int:
        """Returns the first slot of a block of the shard of queries that `index` selects."""
        shards, blocks, tile = self.layouts[0].shape
        return (index[0].indices(shards)[0] * blocks + block) * tile

    def _place_lines(self, tiles: int, spec: P, layout: Layout, first: Callable) -> jax.Array:
        """Returns the factors as a global array (tiles, places, width); its part at an index starts at first(index)."""
        whole = (tiles, layout.places, layout.width)

        def part(index):
            start, stop, _ = index[0].indices(tiles)
            return layout.lines(first(index), (stop - start) * layout.places).reshape(stop - start, *whole[1:])

        return jax.make_array_from_callback(whole, NamedSharding(self.mesh, spec), part)

    def _place(self, array: np.ndarray, spec: P) -> jax.Array:
        """Returns the array on the devices, sharded by `spec`."""
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), array.__getitem__)


def _delayed_by_one(items: Iterable) -> Iterator:
    """Yields each item after the next one has been made."""
    waiting = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def _fetch(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns the whole arrays on every process."""
    if all(array.is_fully_addressable for array in arrays):
        return jax.device_get(list(arrays))
    return [np.asarray(multihost_utils.process_allgather(array, tiled=True)) for array in arrays]


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
