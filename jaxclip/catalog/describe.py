"""Interface of the values that preparation computes for each product; `features.describe` implements it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


class Describer(Protocol):
    """Computes the stored values of products; pickled for worker processes, so it should load models on first use."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The type of each stored value by name."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns every setting that affects the descriptions, as JSON values; they are part of `Source.settings`."""
        ...

    def __call__(self, products: Sequence[Product], pictures: Sequence[Picture]) -> list[Description]:
        """Returns the description of each product; it must depend on neither the machine nor the other products."""
        ...
