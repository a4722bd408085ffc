"""What preparation may compute of a product beyond its picture, and how that is stored. `features` does it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxclip.catalog.pictures import Picture
from jaxclip.catalog.product import Product

TEXT = "text"


@dataclass(frozen=True)
class Column:
    """The shape of a stored value, None where it varies, and its NumPy dtype or "text"."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class Description:
    """What was computed of one product.

    Attributes:
      values: a value for each of the describer's columns.
      oddities: kinds of oddity that were mended on the way, the same words for the same kind.
    """

    values: Mapping[str, Any]
    oddities: tuple[str, ...] = ()


class Describer(Protocol):
    """Describes products; it is pickled into worker processes, so what takes long to load it loads on first use."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The stored values by name."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns, as JSON values, all that decides the descriptions: a dataset is recognised by it."""
        ...

    def __call__(self, products: Sequence[Product], pictures: Sequence[Picture]) -> list[Description]:
        """Returns the description of each product; the same on every machine, in any block of products."""
        ...
