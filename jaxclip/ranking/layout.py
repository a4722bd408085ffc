"""Order, tiling and precision of queries and gallery for the rank kernel."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxclip.ranking import kernel
from jaxclip.ranking.relevance import Relevance
from jaxclip.ranking.selection import Thresholds

TILES = {"cpu": 2048, "gpu": 8192, "tpu": 2048}
"""Back end -> default of the largest number of lines in a tile.

On TPUs the scores of such a tile, 16 MiB, stay in vector memory. GPUs keep larger tiles busy with fewer programs."""
LINES = 2048  # lines that are converted at a time
PRECISIONS = {"float32": (None, None), "bfloat16": ((0,), (0,)), "bfloat16_3x": ((0, 0, 1), (0, 1, 0))}
"""Precision -> the pairs of bfloat16 parts (0 = high, 1 = low) that are multiplied and summed; None = float32 itself.

The first tuple lists the parts of a query, the second the parts of a gallery item that they are multiplied by, in the
same order. The high part of a number is the nearest bfloat16 number, the low part the bfloat16 number nearest to the
remainder."""


@dataclass(frozen=True)
class Layout:
    """How either the queries or the gallery items are ordered and cut into shards, and each shard into tiles.

    A query or gallery item is called a line. A shard consists of tiles of equal size, and a tile of slots. The lines
    fill the slots in the given order; the slots after the last line are empty.

    Attributes:
      embeddings: (lines, D) float32.
      order: (lines,) the line in each slot that is not empty.
      shards: number of shards.
      min_tile: the smallest number of slots in a tile, before it is rounded up as in `tile`.
      max_tile: the largest number of slots in a tile, before it is rounded up as in `tile`.
      parts: the bfloat16 parts of each line that are concatenated, see PRECISIONS; None = the float32 line itself.
    """

    embeddings: np.ndarray
    order: np.ndarray
    shards: int
    min_tile: int
    max_tile: int
    parts: tuple[int, ...] | None
    segments = None  # `pictures.PictureLayout` has several places for a slot

    @property
    def tile(self) -> int:
        """The number of slots in a tile, which is rounded up to a multiple of `kernel.MULTIPLE`.

        A shard of at most `max_tile` lines is one tile. Larger shards have tiles of the size from `max_tile` / 2 (and
        at least `min_tile`) to `max_tile` that leaves the fewest slots empty; if `max_tile` is at least twice
        `kernel.VECTORS`, only multiples of VECTORS are tried.
        """
        lines = -(-len(self.order) // self.shards)
        if lines <= self.max_tile:
            return round_up(max(lines, self.min_tile), kernel.MULTIPLE)
        step = kernel.VECTORS if self.max_tile >= 2 * kernel.VECTORS else kernel.MULTIPLE
        largest = round_up(self.max_tile, step)
        sizes = range(largest, max(largest // 2, self.min_tile) - 1, -step)
        return min(sizes, key=lambda size: round_up(lines, size))

    @property
    def blocks(self) -> int:
        """The number of tiles in a shard."""
        return -(-len(self.order) // (self.shards * self.tile))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of shards, tiles per shard and slots per tile; their product is the number of slots."""
        return self.shards, self.blocks, self.tile

    @property
    def places(self) -> int:
        """The number of places in a tile: rows of embeddings that the kernel multiplies, here one for each slot."""
        return self.tile

    @property
    def rows(self) -> np.ndarray:
        """The row of `embeddings` in each place, from the first tile on; -1 if the place is empty."""
        return self.order

    def row_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of each of R rows of `embeddings`, ascending, and where each row's start, (R + 1,)."""
        order = np.argsort(self.rows, kind="stable")
        starts = np.searchsorted(self.rows[order], np.arange(len(self.embeddings) + 1))
        return order, starts

    def lines(self, start: int, size: int) -> np.ndarray:
        """Returns (size, width) the factors of the rows in `size` places from `start` on; zero for empty places.

        The factors are the numbers that the kernel multiplies: the float32 embedding, or its bfloat16 parts.
        """
        rows = self.rows[start : start + size]
        lines = np.zeros((size, self.width), np.float32 if self.parts is None else jnp.bfloat16)
        for first in range(0, len(rows), LINES):  # converted in blocks, to keep the temporary copy small
            block = self.embeddings[rows[first : first + LINES]]
            if self.parts is not None:
                block = _bfloat16_parts(block, self.parts)
            lines[first : first + len(block)] = block
        lines[: len(rows)][rows < 0] = 0
        return lines

    @property
    def width(self) -> int:
        """The number of factors of a line: D, or D for each of `parts`."""
        return self.embeddings.shape[1] * (1 if self.parts is None else len(self.parts))

    def slots(self) -> np.ndarray:
        """Returns (lines,) the slot of each line."""
        slots = np.empty(len(self.order), np.int64)
        slots[self.order] = np.arange(len(self.order))
        return slots

    def thresholds(self, slots: np.ndarray, within: np.ndarray, scores: np.ndarray) -> Thresholds:
        """Returns the scores of each line's pairs as its thresholds.

        Their limits are (shards, blocks, R, tile), their widths (shards, blocks).

        Args:
          slots: (nnz,) the slot of each relevant pair's line.
          within: (nnz,) the index of each pair among the pairs of its line; R is the first power of two above the
            largest of them.
          scores: (nnz,) the pairs' scores.
        """
        limits = np.full((*self.shape, 1 << int(within.max(initial=0)).bit_length()), np.inf, np.float32)
        limits.reshape(-1, limits.shape[-1])[slots, within] = scores
        widths = np.ones(self.shape[:2], np.int32)
        np.maximum.at(widths.reshape(-1), slots // self.tile, within.astype(np.int32) + 1)
        return Thresholds(limits.swapaxes(2, 3), widths)


def _bfloat16_parts(lines: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Returns (lines, len(parts) * D) bfloat16, the concatenated parts (see PRECISIONS) of float32 lines (lines, D)."""
    high_and_low = [lines.astype(jnp.bfloat16)]
    if 1 in parts:
        high_and_low.append((lines - high_and_low[0].astype(np.float32)).astype(jnp.bfloat16))
    return np.concatenate([high_and_low[part] for part in parts], axis=1)


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below the number."""
    return -(-number // multiple) * multiple


def orders(relevance: Relevance, reverse: Relevance | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns orders of the queries (Q,) and gallery items (G,) that bring relevant pairs close together.

    Lines are grouped by how many relevant pairs they have (1, 2, 3 to 4, 5 to 8, ...), so that a tile has few unused
    thresholds; gallery items only if queries are ranked for them too. Within a group, queries are sorted by their first
    relevant item, and items by the first relevant item of the queries that they are relevant to, so that the pairs lie
    in few small tiles. If each query has one relevant item and each item is relevant to one query, the gallery keeps
    its order.

    Args:
      relevance: the relevant items of the Q queries.
      reverse: the relevant queries of the items; None if queries are not ranked for items.
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
