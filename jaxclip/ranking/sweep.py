"""Passes over all scores of queries and gallery, block by block on the devices, without waiting for each block."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

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


def initial_scores(layouts, slots, finite) -> np.ndarray:
    """Returns (nnz,) the scores of the relevant pairs, computed from the tiles that contain them.

    CPUs compute small tiles, other devices those of the sweep; they are started one after the other and fetched at the
    end.
    """
    sides = [SMALL_TILE if compiler.on_cpu() else layout.tile for layout in layouts]
    tile_of, place = zip(*(np.divmod(slot, side) for slot, side in zip(slots, sides, strict=True)), strict=True)
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


class Sweep:
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
        shard, block_numbers, row = np.unravel_index(self.slots[0], rows.shape)
        tile_numbers, column = np.divmod(self.slots[1], columns.tile)
        by_query, by_item, by_both = P(kernel.AXES[0]), P(kernel.AXES[1]), P(*kernel.AXES)

        def first_slot(index):
            return index[0].indices(tiles)[0] * columns.tile

        gallery = self._place_lines((tiles, columns.tile), by_item, columns, first_slot)
        column_thresholds = Thresholds(
            *(self._place(part.reshape(tiles, *part.shape[2:]), by_item) for part in (column_limits, column_widths))
        )
        state = kernel.empty_state(self.mesh, query_shards, tiles, column_limits.shape[2], columns.tile, self.ks[1])
        for block in progress(range(blocks)):
            pairs = np.flatnonzero(block_numbers == block)
            cell = shard[pairs] * tiles + tile_numbers[pairs]  # the tile of scores that contains each pair
            spot = _number_repeats(cell)
            spots = np.zeros((query_shards, tiles, 1 << int(spot.max(initial=63)).bit_length(), 2), np.int32)
            spots.reshape(query_shards * tiles, -1, 2)[cell, spot] = np.stack([row[pairs], column[pairs]], axis=1)
            state, *result = self.visit(
                np.int32(block),
                np.array([len(rows.order), len(columns.order)], np.int32),
                self._place_lines(
                    (query_shards, rows.tile), by_query, rows, lambda index, block=block: self._first_slot(index, block)
                ),
                gallery,
                Thresholds(self._place(row_limits[:, block], by_query), row_widths[:, block].max()),
                column_thresholds,
                self._place(spots, by_both),
                state,
            )
            yield pairs, (cell, spot), result, state

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
