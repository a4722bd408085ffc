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
    """Queries or gallery items, ordered and cut into tiles; each position in that order is a slot, padding included.

    Attributes:
      embeddings: (lines, D).
      order: (lines,) the line in each slot.
      shards: number of shards that the lines are split over.
      least: the smallest number of lines in a tile.
      most: the largest number of lines in a tile.
      parts: the bfloat16 parts of each line that are concatenated, see PRECISIONS; None = the float32 line itself.
    """

    embeddings: np.ndarray
    order: np.ndarray
    shards: int
    least: int
    most: int
    parts: tuple[int, ...] | None

    @property
    def tile(self) -> int:
        """Lines per tile: a whole shard if it fits, else the size over `most` / 2 with the fewest empty slots."""
        lines = -(-len(self.order) // self.shards)
        if lines <= self.most:
            return _up(max(lines, self.least), kernel.MULTIPLE)
        step = kernel.VECTORS if self.most >= 2 * kernel.VECTORS else kernel.MULTIPLE
        most = _up(self.most, step)
        return min(range(most, max(most // 2, self.least) - 1, -step), key=lambda size: _up(lines, size))

    @property
    def blocks(self) -> int:
        """The number of tiles in a shard."""
        return -(-len(self.order) // (self.shards * self.tile))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of shards, tiles per shard and lines per tile; their product is the number of slots."""
        return self.shards, self.blocks, self.tile

    def lines(self, start: int, size: int) -> np.ndarray:
        """Returns (size, width) the factors of the lines in the slots from `start` on; empty slots are zero."""
        rows = self.order[start : start + size]
        lines = np.zeros((size, self.width), np.float32 if self.parts is None else jnp.bfloat16)
        for first in range(0, len(rows), TILE):  # converted one part at a time, which keeps the temporary copy small
            block = self.embeddings[rows[first : first + TILE]]
            if self.parts is not None:
                block = _bfloat16_parts(block, self.parts)
            lines[first : first + len(block)] = block
        return lines

    @property
    def width(self) -> int:
        """The length of a line's factors."""
        return self.embeddings.shape[1] * (1 if self.parts is None else len(self.parts))

    def slots(self) -> np.ndarray:
        """Returns the slot of each line."""
        slots = np.empty(len(self.order), np.int64)
        slots[self.order] = np.arange(len(self.order))
        return slots

    def thresholds(self, slots: np.ndarray, within: np.ndarray, scores: np.ndarray) -> kernel.Thresholds:
        """Returns each line's thresholds: limits (shards, blocks, R, tile), widths (shards, blocks).

        Args:
          slots: (nnz,) the slot of each relevant pair's line.
          within: (nnz,) the pair's number among the pairs of its line; R is a power of two above the largest.
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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def orders(relevance: Relevance, reverse: Relevance | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (Q,) and (G,) the orders of queries and gallery items that keep relevant pairs near the diagonal.

    Lines with similar numbers of relevant pairs are adjacent, so that a tile has few unused thresholds. Among them,
    queries are sorted by their first relevant item, and items by the first relevant item of the queries that they are
    relevant to, so that few small tiles hold all pairs. Where each query has one item and each item one query, the
    gallery keeps its order.
    """
    first = relevance.indices[relevance.indptr[:-1]]  # (Q,)
    of_item = np.arange(size)
    np.minimum.at(of_item, relevance.indices, first[relevance.rows])
    width = np.ceil(np.log2(np.maximum(1, np.bincount(relevance.indices, minlength=size)))) if reverse else of_item * 0
    return np.lexsort((first, np.ceil(np.log2(relevance.counts)))), np.lexsort((of_item, width))
