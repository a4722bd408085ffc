"""Closed outlines from a few control points, in integers.

Coordinates are in tenths of a pixel of a product drawn at full size, from the middle of the picture, y downwards. An
outline is an array of points, (N, 2) int64, in FINE-ths of that unit; many of one form are (copies, N, 2).
"""

from collections.abc import Sequence

import numpy as np

FINE = 32
ROUND = 10_000  # A radius that no edge is long enough for: the curve then only touches the middles of its edges.
_STEPS = 6

Point = tuple[int, int] | tuple[int, int, int]


def rounded(points: Sequence[Point], radius: int = 20) -> np.ndarray:
    """The closed outline through `points`, corners rounded by `radius`, or by a point's own third number."""
    corner = np.array([point[:2] for point in points], np.int64) * FINE
    wanted = np.array([point[2] if len(point) > 2 else radius for point in points], np.int64)[:, None] * FINE
    before = np.concatenate([corner[-1:], corner[:-1]]) - corner
    after = np.concatenate([corner[1:], corner[:1]]) - corner
    reach, start = _cut(before, wanted)
    _, end = _cut(after, wanted)
    t = np.arange(_STEPS + 1)[:, None]
    weights = (_STEPS - t) ** 2, 2 * t * (_STEPS - t), t**2
    ends = (corner + start, corner, corner + end)
    curve = sum(weight * point[:, None, :] for weight, point in zip(weights, ends, strict=True)) // _STEPS**2
    # Small corners need fewer steps to look round.
    stride = np.where(reach > 60 * FINE, 1, np.where(reach > 12 * FINE, 2, np.where(reach > 0, 3, _STEPS + 1)))
    return _distinct(curve[t.T % stride == 0])


def _cut(edge: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = _length(edge)
    reach = np.minimum(wanted, length // 2)
    return reach, edge * reach // length


def _length(vectors: np.ndarray) -> np.ndarray:
    # A square root is rounded correctly by IEEE 754, so its floor is the same everywhere.
    x, y = vectors[:, :1], vectors[:, 1:]
    return np.maximum(np.sqrt(x * x + y * y).astype(np.int64), 1)


def _distinct(points: np.ndarray) -> np.ndarray:
    moved = points[1:] != points[:-1]
    return points[np.append(moved[:, 0] | moved[:, 1], True)]


def path(points: Sequence[Point], radius: int = ROUND) -> np.ndarray:
    """An open curve from the first of `points` to the last, for `ribbon`."""
    first, *middle, last = points
    return rounded([(*first[:2], 0), *middle, (*last[:2], 0)], radius)


def ribbon(line: np.ndarray, width: int, closed: bool = False) -> np.ndarray:
    """The outline of a line of some `width` along `line`."""
    if closed:
        line = np.concatenate([line, line[:1]])
    line = _distinct(line)
    along = line[1:] - line[:-1]
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) * (width * FINE) // (2 * _length(along))
    first, last = (normal[-1:], normal[:1]) if closed else (normal[:1], normal[-1:])
    offset = (np.concatenate([first, normal]) + np.concatenate([normal, last])) // 2
    return np.concatenate([line + offset, (line - offset)[::-1]])


def mirrored(outline: np.ndarray) -> np.ndarray:
    """`outline` with left and right exchanged."""
    return outline * np.array([-1, 1])


def symmetric(points: Sequence[Point], radius: int = 20) -> np.ndarray:
    """The closed outline of which `points` give the right half, from top to bottom."""
    left = [(-point[0], *point[1:]) for point in reversed(points) if point[0] != 0]
    return rounded([*points, *left], radius)


def rectangle(left: int, top: int, right: int, bottom: int, radius: int = 0) -> np.ndarray:
    """A rectangle, its corners rounded by `radius`."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return rounded(corners, radius) if radius else np.array(corners, np.int64) * FINE


def ellipse(x: int, y: int, horizontal: int, vertical: int) -> np.ndarray:
    """An ellipse around (x, y) with these radii."""
    across, down = horizontal * 5 // 12, vertical * 5 // 12
    right = [
        (x + across, y - vertical),
        (x + horizontal, y - down),
        (x + horizontal, y + down),
        (x + across, y + vertical),
    ]
    left = [(2 * x - px, py) for px, py in reversed(right)]
    return rounded([*right, *left], ROUND)


def placed(outline: np.ndarray, x: int, y: int, percent: int = 100) -> np.ndarray:
    """`outline` made `percent` as large and moved to (x, y)."""
    return outline * percent // 100 + np.array([x, y]) * FINE


def repeated(outline: np.ndarray, spots: Sequence[tuple[int, int]]) -> np.ndarray:
    """Copies of `outline` moved to each of `spots`."""
    return outline + np.array(spots, np.int64).reshape(-1, 1, 2) * FINE


def bounds(outlines: Sequence[np.ndarray]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of `outlines` together, in whole units."""
    every = np.concatenate([outline.reshape(-1, 2) for outline in outlines]) // FINE
    return (*every.min(axis=0).tolist(), *every.max(axis=0).tolist())
