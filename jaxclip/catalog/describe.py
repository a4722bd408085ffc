"""Interface for values computed per product during preparation; `features` implements it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product

TEXT = "text"


@dataclass(frozen=True)
class Column:
    """The shape of a stored value, with None for variable sizes, and its NumPy dtype or "text"."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """The values computed for one product.

    Attributes:
      values: one value for each of the describer's columns.
      oddities: kinds of oddity that were mended, always in the same words per kind.
    """

    values: Mapping[str, Any]
    oddities: tuple[str, ...] = ()


class Describer(Protocol):
    """Describes products; it is pickled into worker processes, so it should load models on first use."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The stored values by name."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns every setting that affects the descriptions, as JSON values; it identifies the prepared dataset."""
        ...

    def __call__(self, products: Sequence[Product], pictures: Sequence[Picture]) -> list[Description]:
        """Returns the description of each product; the same on every machine, in any block of products."""
        ...
