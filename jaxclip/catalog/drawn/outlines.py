"""Computes closed outlines from a few control points in integer arithmetic.

Coordinates are from the middle of the picture, y downwards; a unit is 1/1200 of the picture's width (`canvas.UNITS`)
if the product is drawn at full size. An outline is an array of points, (points, 2) int64, in 1/FINE of a unit; copies
of one outline are (copies, points, 2).
"""

from collections.abc import Sequence

import numpy as np

FINE = 32
ROUND = 10_000  # A radius larger than any edge: the curve then touches only the midpoints of the edges.
_STEPS = 6

Point = tuple[int, int] | tuple[int, int, int]


def rounded(points: Sequence[Point], radius: int = 20) -> np.ndarray:
    """Returns the closed outline whose corners are `points`, rounded by `radius` or by a point's third number.

    A curve replaces each corner. It begins and ends `radius` units from the corner, at most in the middle of an edge.
    """
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
    """Returns an open curve from the first of `points` to the last, with the others `rounded`, for `ribbon`."""
    first, *middle, last = points
    return rounded([(*first[:2], 0), *middle, (*last[:2], 0)], radius)


def ribbon(line: np.ndarray, width: int, closed: bool = False) -> np.ndarray:
    """Returns the outline of a stroke along `line`, `width` units wide; `closed` joins the line's end to its start."""
    if closed:
        line = np.concatenate([line, line[:1]])
    line = _distinct(line)
    along = line[1:] - line[:-1]
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) * (width * FINE) // (2 * _length(along))
    first, last = (normal[-1:], normal[:1]) if closed else (normal[:1], normal[-1:])
    offset = (np.concatenate([first, normal]) + np.concatenate([normal, last])) // 2
    return np.concatenate([line + offset, (line - offset)[::-1]])


def mirrored(outline: np.ndarray) -> np.ndarray:
    """Returns `outline` with left and right exchanged."""
    return outline * np.array([-1, 1])


def symmetric(points: Sequence[Point], radius: int = 20) -> np.ndarray:
    """Returns the closed, symmetric outline whose right half has its corners at `points`, from top to bottom."""
    left = [(-point[0], *point[1:]) for point in reversed(points) if point[0] != 0]
    return rounded([*points, *left], radius)


def rectangle(left: int, top: int, right: int, bottom: int, radius: int = 0) -> np.ndarray:
    """Returns a rectangle with corners rounded by `radius`."""
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return rounded(corners, radius) if radius else np.array(corners, np.int64) * FINE


def ellipse(x: int, y: int, horizontal: int, vertical: int) -> np.ndarray:
    """Returns an outline close to the ellipse around (x, y) with these radii."""
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
    """Returns `outline` scaled to `percent`, with its origin moved to (x, y)."""
    return outline * percent // 100 + np.array([x, y]) * FINE


def repeated(outline: np.ndarray, spots: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns copies of `outline`, (copies, points, 2), each with its origin moved to one of `spots`."""
    return outline + np.array(spots, np.int64).reshape(-1, 1, 2) * FINE


def bounds(outlines: Sequence[np.ndarray]) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom of all `outlines` together, rounded down to whole units."""
    every = np.concatenate([outline.reshape(-1, 2) for outline in outlines]) // FINE
    return (*every.min(axis=0).tolist(), *every.max(axis=0).tolist())
