"""Antialiased filling of outlines in integer arithmetic.

Pillow draws polygons in single-precision floats, whose results depend on whether the processor fuses multiply and
add. Here only integer quotients are rounded, always down, so a picture has the same pixels on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PIXEL = 256  # Subpixel units per pixel, along x and y.
_LINES = 4  # Scan lines per row of pixels; along a scan line the coverage is exact.
_STEP = PIXEL // _LINES


@dataclass(frozen=True)
class Mask:
    """The coverage of each pixel (0 to 256) in a window of the picture.

    Attributes:
      alpha: (rows, columns) int32.
      top: the window's first row in the picture.
      left: the window's first column in the picture.
    """

    alpha: np.ndarray
    top: int
    left: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The window's rows and columns in the picture."""
        rows, columns = self.alpha.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)

    def seen_by(self, other: "Mask") -> np.ndarray:
        """Returns this mask's coverage in the window of `other`, zero outside their overlap."""
        seen = np.zeros(other.alpha.shape, np.int32)
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.alpha.shape[0], other.top + other.alpha.shape[0])
        right = min(self.left + self.alpha.shape[1], other.left + other.alpha.shape[1])
        if top < bottom and left < right:
            mine = self.alpha[top - self.top : bottom - self.top, left - self.left : right - self.left]
            seen[top - other.top : bottom - other.top, left - other.left : right - other.left] = mine
        return seen

    def within(self, other: "Mask") -> "Mask":
        """Returns the intersection of both masks (the product of their coverages) in this mask's window."""
        return Mask(self.alpha * other.seen_by(self) >> 8, self.top, self.left)

    def without(self, other: "Mask") -> "Mask":
        """Returns this mask without what `other` covers of each pixel."""
        return Mask(self.alpha * (256 - other.seen_by(self)) >> 8, self.top, self.left)


def coverage(points: np.ndarray, lengths: Sequence[int], height: int, width: int) -> Mask:
    """Returns the mask of the union of closed outlines, clipped to the picture.

    Args:
      points: (all points, 2) integers, x and y in 1/PIXEL of a pixel, one outline after the other.
      lengths: the number of points of each outline.
      height: height of the picture in pixels.
      width: width of the picture in pixels.
    """
    start, end, turning = _edges(points, np.asarray(lengths))
    first = np.minimum(np.maximum((start[:, 1] + _STEP // 2 - 1) // _STEP, 0), height * _LINES)
    last = np.minimum(np.maximum((end[:, 1] + _STEP // 2 - 1) // _STEP, 0), height * _LINES)
    crossed = np.flatnonzero(first != last)
    if not crossed.size:
        return Mask(np.zeros((1, 1), np.int32), 0, 0)
    start, end, first, last = start[crossed], end[crossed], first[crossed], last[crossed]
    sign = np.where(first < last, turning[crossed], -turning[crossed])
    first, counts = np.minimum(first, last), np.abs(last - first)

    edge = np.repeat(np.arange(len(counts)), counts)
    line = np.arange(len(edge)) + (first - np.cumsum(counts) + counts)[edge]
    # Integers in float64: sums and products are exact, and so is the floor of a quotient, below 2**48.
    x, y, along_x, along_y, sign = np.stack([*start.T, *(end - start).T, sign]).astype(np.float64).take(edge, axis=1)
    crossing = x + np.floor((line * _STEP + _STEP // 2 - y) * along_x / along_y)
    crossing = np.minimum(np.maximum(crossing, 0), width * PIXEL - 1).astype(np.int64)
    column, row = crossing >> 8, line // _LINES

    top, left = int(row.min()), int(column.min())
    rows, columns = int(row.max()) - top + 1, int(column.max()) - left + 2
    cell = (row - top) * columns + column - left
    right_part = (crossing & 255) * sign
    change = np.bincount(cell, sign * PIXEL - right_part, rows * columns)
    change += np.bincount(cell + 1, right_part, rows * columns)
    area = np.abs(np.cumsum(change.astype(np.int32).reshape(rows, columns), axis=1, dtype=np.int32))
    alpha = np.minimum(area // _LINES, 256)[:, : width - left]
    return Mask(alpha, top, left)


def _edges(points: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the start and end of each edge, and the orientation of its outline, 1 or -1."""
    behind = np.cumsum(lengths)
    ends = np.concatenate([points[1:], points[:1]])
    ends[behind - 1] = points[behind - lengths]
    areas = np.add.reduceat(points[:, 0] * ends[:, 1] - ends[:, 0] * points[:, 1], behind - lengths)
    return points, ends, np.repeat(np.where(areas < 0, -1, 1), lengths)
