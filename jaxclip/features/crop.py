"""Selects the crops of a picture among a detector's boxes."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.errors import UserError
from jaxclip.features.detectors.detections import Detections

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture's width and height."""

POLICIES = ("largest", "confident", "category", "all:K")
_IGNORED = re.compile(r"[-'’.]")
_WORD = re.compile(r"\w+")
_PLURAL = re.compile(r"(?<=[a-z]{2})(?:(?<=ss|sh|ch)es|(?<=x)es|(?<=[^su])s)$")


@dataclass(frozen=True)
class Crop:
    """A part of a picture, around a box of a detector, or the whole picture.

    Attributes:
      box: the padded box, clipped to the picture.
      score: the detector's score; 0 if nothing was detected.
      label: the detector's label; "" if nothing was detected.
      fell_back: whether nothing was detected and the crop is the whole picture.
    """

    box: Box
    score: float
    label: str
    fell_back: bool


WHOLE = Crop((0.0, 0.0, 1.0, 1.0), 0.0, "", fell_back=True)


def choose(detections: Detections, policy: str, category: str = "", padding: float = 0.0) -> tuple[Crop, ...]:
    """Returns the crops that a policy selects from a picture's detections, best first: one, or up to K for `all:K`.

    Without detections, the only crop is the whole picture, with `fell_back` set.

    Args:
      detections: the detections in one picture.
      policy: `largest` selects the box of the largest area; `confident` the most confident box; `category` the most
        confident box whose label matches the product's category (`same_kind`: "shoe" matches "Sports Shoes"), or the
        most confident of all boxes if no label matches; `all:K` the K most confident boxes.
      category: the product's category, for the policy `category`.
      padding: margin added on each side, as a share of the box's width or height.

    Raises:
      UserError: the policy is unknown, or the padding is negative or not finite.
    """
    count = check(policy, padding)
    if not len(detections):
        return (WHOLE,)
    if policy == "largest":
        sides = detections.boxes[:, 2:] - detections.boxes[:, :2]
        chosen = [int(sides.prod(axis=1).argmax())]
    elif policy == "category":
        chosen = [next((i for i, label in enumerate(detections.labels) if same_kind(label, category)), 0)]
    else:
        chosen = list(range(min(count, len(detections))))
    return tuple(
        Crop(pad(detections.boxes[i], padding), float(detections.scores[i]), detections.labels[i], fell_back=False)
        for i in chosen
    )


def check(policy: str, padding: float) -> int:
    """Returns the largest number of crops that a policy selects; UserError if the policy or the padding is invalid."""
    if not (math.isfinite(padding) and padding >= 0):
        raise UserError(f"the padding of crops is {padding}; give a share of the box that is 0 or more, such as 0.1")
    if policy in POLICIES[:3]:
        return 1
    name, _, count = policy.partition(":")
    if name == "all" and re.fullmatch("[1-9][0-9]{0,3}", count):
        return int(count)
    raise UserError(f'the crop policy is "{policy}"; give one of {", ".join(POLICIES)}, where K is from 1 to 9999')


def same_kind(label: str, category: str) -> bool:
    """Returns whether one name contains all words of the other.

    Case, hyphens, apostrophes, full stops and plural endings are ignored: "T-shirt" is the same as "Tshirts".
    """
    a, b = _words(label), _words(category)
    return bool(a and b) and (a <= b or b <= a)


def _words(name: str) -> frozenset[str]:
    words = _WORD.findall(_IGNORED.sub("", name.casefold()).replace("_", " "))
    return frozenset(_PLURAL.sub("", word) for word in words)


def pad(box: Sequence[float], padding: float) -> Box:
    """Returns a box grown on each side by a share of its own width or height, clipped to the picture."""
    left, top, right, bottom = (float(side) for side in box)
    x, y = padding * (right - left), padding * (bottom - top)
    return max(left - x, 0.0), max(top - y, 0.0), min(right + x, 1.0), min(bottom + y, 1.0)


def cut(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Returns the pixels of a picture (height, width, ...) that a box touches, as a view of at least one pixel.

    Args:
      image: a picture of at least one pixel.
      box: left, top, right, bottom as shares; the part outside the picture is ignored.

    Raises:
      ValueError: the picture is empty or the box is not finite.
    """
    height, width = image.shape[:2]
    if not (height and width and np.isfinite(box).all()):
        raise ValueError(f"expected a picture and a finite box, got {width}x{height} pixels and the box {tuple(box)}")
    left, top, right, bottom = box
    return image[_span(top, bottom, height), _span(left, right, width)]


def _span(start: float, end: float, pixels: int) -> slice:
    # Overlaps of up to a thousandth of a pixel are rounding errors, because shares are float32.
    first = min(max(math.floor(start * pixels + 1e-3), 0), pixels - 1)
    last = min(max(math.ceil(end * pixels - 1e-3), first + 1), pixels)
    return slice(first, last)
