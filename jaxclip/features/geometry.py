"""Computes size, aspect, position and overlap of bounding boxes."""

import numpy as np
from jaxtyping import Float32

NAMES = ("width", "height", "area", "aspect", "centre_x", "centre_y")
"""The columns of `box_geometry`."""

_MIN_SIDE = 1e-4


def box_geometry(boxes: Float32[np.ndarray, "N 4"]) -> Float32[np.ndarray, "N 6"]:
    """Returns width, height, area, aspect and centre of each box: the "box dimensions" feature of re-rankers.

    Width, height and centre are shares of the picture's sides, and the area is a share of the picture's area. The
    aspect is ln(width / height) of these shares: 0 for the whole picture; swapping width and height changes its sign.
    Sides shorter than 1e-4 count as 1e-4 in it, so that it is finite for boxes without area.

    Args:
      boxes: left, top, right, bottom as shares of the picture.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    left, top, right, bottom = boxes.T
    width, height = np.maximum(right - left, 0), np.maximum(bottom - top, 0)
    aspect = np.log(np.maximum(width, _MIN_SIDE) / np.maximum(height, _MIN_SIDE))
    return np.stack([width, height, width * height, aspect, (left + right) / 2, (top + bottom) / 2], axis=1)


def iou(a: Float32[np.ndarray, "N 4"], b: Float32[np.ndarray, "M 4"]) -> Float32[np.ndarray, "N M"]:
    """Returns the intersection over union of each box of `a` with each box of `b`; 0 if neither has an area."""
    a, b = (np.asarray(boxes, np.float32).reshape(-1, 4) for boxes in (a, b))
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    intersection = np.maximum(sides, 0).prod(axis=2)
    union = _areas(a)[:, None] + _areas(b)[None, :] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1)
