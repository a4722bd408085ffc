"""Order, tiling and precision of queries and gallery for the rank kernel."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxclip.ranking import kernel
from jaxclip.ranking.relevance import Relevance

TILE = 2048
PRECISIONS = {"float32": (None, None), "bfloat16": ((0,), (0,)), "bfloat16_3x": ((0, 0, 1), (0, 1, 0))}
"""Precision -> the pairs of bfloat16 parts (0 = high, 1 = low) that are multiplied and summed; None = float32 itself.

The first tuple lists the parts of a query, the second the parts of an item that they are multiplied by. The high part
of a number is the nearest bfloat16 number, the low part the bfloat16 number nearest to the remainder."""


@dataclass(frozen=True)
class Layout:
    """Queries or gallery items, the lines, in an order that is cut into tiles.

    A tile consists of slots, each of which holds a line or is empty.

    Attributes:
      embeddings: (lines, D) float32.
      order: (lines,) the line in each slot.
      shards: number of shards that the lines are split over.
      min_tile: the smallest number of lines in a tile.
      max_tile: the largest number of lines in a tile.
      parts: the bfloat16 parts of each line that are concatenated, see PRECISIONS; None = the float32 line itself.
    """

    embeddings: np.ndarray
    order: np.ndarray
    shards: int
    min_tile: int
    max_tile: int
    parts: tuple[int, ...] | None

    @property
    def tile(self) -> int:
        """Lines per tile: a whole shard if it fits, else the size >= `max_tile` / 2 with the fewest empty slots."""
        lines = -(-len(self.order) // self.shards)
        if lines <= self.max_tile:
            return _round_up(max(lines, self.min_tile), kernel.MULTIPLE)
        step = kernel.VECTORS if self.max_tile >= 2 * kernel.VECTORS else kernel.MULTIPLE
        largest = _round_up(self.max_tile, step)
        sizes = range(largest, max(largest // 2, self.min_tile) - 1, -step)
        return min(sizes, key=lambda size: _round_up(lines, size))

    @property
    def blocks(self) -> int:
        """The number of tiles in a shard."""
        return -(-len(self.order) // (self.shards * self.tile))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of shards, tiles per shard and lines per tile; their product is the number of slots."""
        return self.shards, self.blocks, self.tile

    def lines(self, start: int, size: int) -> np.ndarray:
        """Returns (size, width) the factors of the lines in the slots from `start` on; empty slots are zero.

        The factors are the numbers that the kernel multiplies: the float32 embedding, or its bfloat16 parts.
        """
        rows = self.order[start : start + size]
        lines = np.zeros((size, self.width), np.float32 if self.parts is None else jnp.bfloat16)
        for first in range(0, len(rows), TILE):  # converted in blocks, to keep the temporary copy small
            block = self.embeddings[rows[first : first + TILE]]
            if self.parts is not None:
                block = _bfloat16_parts(block, self.parts)
            lines[first : first + len(block)] = block
        return lines

    @property
    def width(self) -> int:
        """The number of factors of a line."""
        return self.embeddings.shape[1] * (1 if self.parts is None else len(self.parts))

    def slots(self) -> np.ndarray:
        """Returns (lines,) the slot of each line."""
        slots = np.empty(len(self.order), np.int64)
        slots[self.order] = np.arange(len(self.order))
        return slots

    def thresholds(self, slots: np.ndarray, within: np.ndarray, scores: np.ndarray) -> kernel.Thresholds:
        """Returns each line's thresholds: limits (shards, blocks, R, tile), widths (shards, blocks).

        Args:
          slots: (nnz,) the slot of each relevant pair's line.
          within: (nnz,) the index of each pair among the pairs of its line; R is a power of two above the largest.
          scores: (nnz,) the pairs' scores.
        """
        limits = np.full((*self.shape, 1 << int(within.max(initial=0)).bit_length()), np.inf, np.float32)
        limits.reshape(-1, limits.shape[-1])[slots, within] = scores
        widths = np.ones(self.shape[:2], np.int32)
        np.maximum.at(widths.reshape(-1), slots // self.tile, within.astype(np.int32) + 1)
        return kernel.Thresholds(limits.swapaxes(2, 3), widths)


def _bfloat16_parts(lines: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Returns (n, parts * D) bfloat16, the concatenated parts (see PRECISIONS) of float32 lines."""
    high_and_low = [lines.astype(jnp.bfloat16)]
    if 1 in parts:
        high_and_low.append((lines - high_and_low[0].astype(np.float32)).astype(jnp.bfloat16))
    return np.concatenate([high_and_low[part] for part in parts], axis=1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def orders(relevance: Relevance, reverse: Relevance | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (Q,) and (G,) the orders of queries and gallery items that keep relevant pairs near the diagonal.

    Lines with similar numbers of relevant pairs are adjacent, so that a tile has few unused thresholds. Among them,
    queries are sorted by their first relevant item, and items by the first relevant item of the queries that they are
    relevant to, so that few small tiles hold all pairs. If each query has one item and each item one query, the gallery
    keeps its order.

    Args:
      relevance: the relevant items of the Q queries.
      reverse: the relevant queries of the items; None if only queries are ranked for.
      size: G, the number of gallery items.
    """
    first_item = relevance.indices[relevance.indptr[:-1]]  # (Q,)
    item_key = np.arange(size)
    np.minimum.at(item_key, relevance.indices, first_item[relevance.rows])
    query_width = np.ceil(np.log2(relevance.counts))
    item_width = np.zeros(size)
    if reverse:
        item_width = np.ceil(np.log2(np.maximum(1, np.bincount(relevance.indices, minlength=size))))
    return np.lexsort((first_item, query_width)), np.lexsort((item_key, item_width))
