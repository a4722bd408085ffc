"""Interface of the values that preparation computes for each product; `features.describe` implements it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product

TEXT = "text"


@dataclass(frozen=True)
class Column:
    """The type of a stored value: its shape, with None for variable sizes, and the name of its NumPy dtype or TEXT."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """The values computed for one product.

    Attributes:
      values: one value for each of the describer's columns.
      oddities: kinds of oddity that the describer mended; a kind always has the same words, so that it can be counted.
    """

    values: Mapping[str, Any]
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DescribedCrop:
    """A crop of a picture, as `features.describe` stores it.

    Attributes:
      box: (4,) left, top, right, bottom as shares of the picture.
      label: what the detector calls it; "" if nothing was detected.
      colours: (name, (3,) uint8 RGB, share) of each dominant colour, the largest share first.
    """

    box: np.ndarray
    label: str
    colours: list[tuple[str, np.ndarray, float]]


@dataclass(frozen=True, eq=False)
class DescribedPicture:
    """A picture of a product, as `features.describe` stores it.

    Attributes:
      boxes: (N, 4) all detected boxes, like `DescribedCrop.box`.
      box_labels: the label of each box.
      crops: its crops, best first.
    """

    boxes: np.ndarray
    box_labels: list[str]
    crops: list[DescribedCrop]


def described_pictures(values: Mapping[str, Any]) -> list[DescribedPicture]:
    """Returns the pictures of a product from the `values` of its description, in the product's order."""
    counts = np.asarray(values["counts"]).reshape(-1, 2)
    if not len(counts):
        counts = np.array([[len(values["boxes"]), len(values["crops"])]])
    width = len(values["colour_names"]) // len(values["crops"])
    crops = [
        DescribedCrop(
            np.asarray(box),
            label,
            list(zip(values["colour_names"][row * width : (row + 1) * width], rgb, map(float, shares), strict=True)),
        )
        for row, (box, label, rgb, shares) in enumerate(
            zip(values["crops"], values["crop_labels"], values["colour_rgb"], values["colour_shares"], strict=True)
        )
    ]
    boxes, labels = np.asarray(values["boxes"]).reshape(-1, 4), list(values["box_labels"])
    ends = counts.cumsum(axis=0)
    return [
        DescribedPicture(
            boxes[end[0] - size[0] : end[0]], labels[end[0] - size[0] : end[0]], crops[end[1] - size[1] : end[1]]
        )
        for size, end in zip(counts, ends, strict=True)
    ]


class Describer(Protocol):
    """Computes the stored values of products; pickled for worker processes, so it should load models on first use."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The type of each stored value by name."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns every setting that affects the descriptions, as JSON values; they are part of `Source.settings`."""
        ...

    def __call__(self, products: Sequence[Product], pictures: Sequence[Sequence[Picture]]) -> list[Description]:
        """Returns the description of each product, of which all pictures are given, at least one.

        It must depend on neither the machine nor the other products.
        """
        ...
