"""Queries and gallery items as the ranks kernel sweeps them: in which order, cut into which tiles, multiplied how."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxclip.ranking import kernel
from jaxclip.ranking.relevance import Relevance

TILE = 2048
PRODUCTS = {"float32": (None, None), "bfloat16": ((0,), (0,)), "bfloat16_3x": ((0, 0, 1), (0, 1, 0))}
"""How scores are multiplied out -> which bfloat16 parts of a query meet which of an item, None for float32 itself: a
number is nearly the sum of two, the nearest (0) and that of what it leaves (1)."""


@dataclass(frozen=True)
class Layout:
    """Queries or gallery items in the order of the sweep, cut into tiles: `order[slot]` is the line in a slot.

    `parts` are the bfloat16 parts that products take of each line, behind each other; None = the float32 line itself.
    """

    embeddings: np.ndarray
    order: np.ndarray
    shards: int
    least: int
    most: int
    parts: tuple[int, ...] | None

    @property
    def tile(self) -> int:
        """Lines of a tile: all where they fit, else what leaves the fewest slots empty, from half of `most` up."""
        lines = -(-len(self.order) // self.shards)
        if lines <= self.most:
            return _up(max(lines, self.least), kernel.MULTIPLE)
        step = kernel.VECTORS if self.most >= 2 * kernel.VECTORS else kernel.MULTIPLE
        most = _up(self.most, step)
        return min(range(most, max(most // 2, self.least) - 1, -step), key=lambda size: _up(lines, size))

    @property
    def blocks(self) -> int:
        return -(-len(self.order) // (self.shards * self.tile))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.shards, self.blocks, self.tile

    def lines(self, start: int, size: int) -> np.ndarray:
        """Returns what products take of the lines in the slots from `start` on, (size, width); empty slots are zero."""
        chosen = self.order[start : start + size]
        lines = np.zeros((size, self.width), np.float32 if self.parts is None else jnp.bfloat16)
        for first in range(0, len(chosen), TILE):  # in turns: the temporary copy stays small
            some = self.embeddings[chosen[first : first + TILE]]
            if self.parts is not None:
                some = _halves(some, self.parts)
            lines[first : first + len(some)] = some
        return lines

    @property
    def width(self) -> int:
        return self.embeddings.shape[1] * (1 if self.parts is None else len(self.parts))

    def slots(self) -> np.ndarray:
        """Returns the slot of each line."""
        slots = np.empty(len(self.order), np.int64)
        slots[self.order] = np.arange(len(self.order))
        return slots

    def thresholds(self, slots: np.ndarray, within: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores of each line's pairs, (shards, blocks, R, tile), and how many of the R a block uses.

        `within` numbers the pairs of a line; R is a power of two.
        """
        limits = np.full((*self.shape, 1 << int(within.max(initial=0)).bit_length()), np.inf, np.float32)
        limits.reshape(-1, limits.shape[-1])[slots, within] = scores
        widths = np.ones(self.shape[:2], np.int32)
        np.maximum.at(widths.reshape(-1), slots // self.tile, within.astype(np.int32) + 1)
        return limits.swapaxes(2, 3), widths


def _halves(lines: np.ndarray, parts: tuple[int, ...]) -> np.ndarray:
    """Returns (n, parts * D) bfloat16, the parts of float32 lines (see PRODUCTS) behind each other."""
    found = [lines.astype(jnp.bfloat16)]
    if 1 in parts:
        found.append((lines - found[0].astype(np.float32)).astype(jnp.bfloat16))
    return np.concatenate([found[part] for part in parts], axis=1)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def orders(relevance: Relevance, reverse: Relevance | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orders in which queries and gallery items are swept: pairs near the diagonal, like counts together.

    Each item comes where the first query that it is relevant to has its first item. So few small tiles hold all pairs,
    and a tile is hardly wider than its lines need. Where each query has one item and each item one query, the gallery
    keeps its order.
    """
    first = relevance.indices[relevance.indptr[:-1]]  # (Q,)
    of_item = np.arange(size)
    np.minimum.at(of_item, relevance.indices, first[relevance.rows])
    width = np.ceil(np.log2(np.maximum(1, np.bincount(relevance.indices, minlength=size)))) if reverse else of_item * 0
    return np.lexsort((first, np.ceil(np.log2(relevance.counts)))), np.lexsort((of_item, width))
