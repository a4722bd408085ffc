"""The interface of detectors and their result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes detected in one picture, best first.

    Attributes:
      boxes: (N, 4) float32: left, top, right, bottom as shares of the picture's width and height, from 0 to 1.
      scores: (N,) float32, in descending order.
      labels: class name of each box.
      mask: (height, width) bool, True at the product's pixels; None if the detector does not segment.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]
    mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, boxes: Sequence, scores: Sequence[float], labels: Sequence[str]) -> "Detections":
        """Returns detections clipped to the picture and sorted by score, without empty boxes and NaN scores.

        Raises:
          ValueError: the numbers of boxes, scores and labels differ.
        """
        boxes = np.clip(np.asarray(boxes, np.float32).reshape(-1, 4), 0, 1)
        scores = np.asarray(scores, np.float32).reshape(-1)
        if not len(boxes) == len(scores) == len(labels):
            raise ValueError(
                f"expected equal numbers, got {len(boxes)} boxes, {len(scores)} scores, {len(labels)} labels"
            )
        valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & ~np.isnan(scores)
        order = np.argsort(-scores, kind="stable")
        order = order[valid[order]]
        return cls(boxes[order], scores[order], tuple(labels[index] for index in order))


NONE = Detections.of([], [], [])
"""The detections of a picture in which nothing was detected."""


class Detector(Protocol):
    """Detects objects in pictures."""

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        """Returns the detections of each picture.

        Args:
          images: pictures of any size, each (height, width, 3) uint8 RGB.
          names: file name or product id of each picture, by which stored boxes are looked up.
        """
