"""Interface of the values that preparation computes for each product; `features` implements it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product

TEXT = "text"


@dataclass(frozen=True)
class Column:
    """The type of a stored value: its shape, with None for variable sizes, and its NumPy dtype or TEXT."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """The values computed for one product.

    Attributes:
      values: one value for each of the describer's columns.
      oddities: kinds of oddity that were mended; a kind always has the same words, so that it can be counted.
    """

    values: Mapping[str, Any]
    oddities: tuple[str, ...] = ()


class Describer(Protocol):
    """Computes values of products. It is pickled for worker processes, so models should be loaded on first use."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The stored values by name."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns every setting that affects the descriptions, as JSON values; they identify the prepared dataset."""
        ...

    def __call__(self, products: Sequence[Product], pictures: Sequence[Picture]) -> list[Description]:
        """Returns the description of each product, which depends on neither the machine nor the other products."""
        ...
