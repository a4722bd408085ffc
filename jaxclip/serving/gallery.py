"""The products of a searchable gallery: captions, filters and pictures."""

import difflib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from jaxclip.catalog.product import Product
from jaxclip.errors import UserError

CATEGORY = "category"
ABSENT = -1
Filters = Mapping[str, Sequence[str]]
"""Attribute -> values; a product passes if, for every attribute, it has one of the values."""


@dataclass(frozen=True)
class Facet:
    """An attribute to filter by: its values and how many products have each, most common first."""

    name: str
    values: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class ProductDetails:
    """Everything stored about a product except its pictures.

    Attributes:
      product: the product as in the catalogue.
      features: column name -> value measured by preparation; empty if it measured nothing.
    """

    product: Product
    features: Mapping[str, Any]


class Gallery:
    """The products of a catalogue; a product's number is its index, from 0, in the order of their vectors.

    Attributes:
      name: name of the catalogue, for display.
      ids: id of each product.
      captions: first caption of each product; "" if it has none.
      categories: category of each product; "" if it is unknown.
      pictures: a product's number -> its encoded pictures, JPEG or PNG, the main picture first.
      details: a product's number -> its details.
    """

    def __init__(
        self,
        name: str,
        products: Iterable[Product],
        pictures: Callable[[int], Sequence[bytes]],
        details: Callable[[int], ProductDetails],
    ):
        self.name, self.pictures, self.details = name, pictures, details
        self.ids: list[str] = []
        self.captions: list[str] = []
        self.categories: list[str] = []
        self._columns: dict[str, _Column] = {}
        for number, product in enumerate(products):
            self.ids.append(product.id)
            self.captions.append(product.captions[0] if product.captions else "")
            self.categories.append(product.category)
            values = {CATEGORY: product.category} | dict(product.attributes)
            for attribute, value in values.items():
                if value:
                    self._columns.setdefault(attribute, _Column()).append(number, value)
        self._numbers = {id: number for number, id in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def number(self, id: str) -> int | None:
        """Returns the index of the product with an id, or None if there is no such product."""
        return self._numbers.get(id)

    def facets(self, max_values: int = 150) -> list[Facet]:
        """Returns the attributes that have few enough values for a user to choose from.

        That is 2 to `max_values` values, and at most half as many values as products, except that 2 are always few
        enough. An attribute that divides the products exactly as an earlier one does is left out.
        """
        facets, partitions = [], []
        for name, column in self._columns.items():
            values = column.counts()
            if not 2 <= len(values) <= min(max_values, max(2, len(self) // 2)):
                continue
            codes = column.codes(len(self))
            if not any(np.array_equal(codes, other) for other in partitions):
                facets.append(Facet(name, values))
                partitions.append(codes)
        return facets

    def allowed(self, filters: Filters) -> Bool[np.ndarray, "G"] | None:
        """Returns a mask of the products that pass the filters, or None if there are no filters.

        Raises:
          UserError: the gallery has no such attribute, or no product has such a value.
        """
        if not filters:
            return None
        passing = np.ones(len(self), bool)
        for name, values in filters.items():
            if name not in self._columns:
                raise UserError(f"filter: products have no attribute {name!r}{_suggestion(name, self._columns)}")
            passing &= np.isin(self._columns[name].codes(len(self)), self._columns[name].find(name, values))
        return passing


class _Column:
    """The values of one attribute: a code per product, the index of its value in order of first appearance."""

    def __init__(self) -> None:
        self._values: dict[str, int] = {}
        self._codes = array("i")

    def append(self, number: int, value: str) -> None:
        """Stores the value of the product at index `number`; calls must be in ascending order of indices."""
        self._codes.extend([ABSENT] * (number - len(self._codes)))
        self._codes.append(self._values.setdefault(value, len(self._values)))

    def codes(self, count: int) -> np.ndarray:
        """Returns the codes of `count` products, ABSENT for those without a value."""
        codes = np.frombuffer(self._codes, np.intc)
        return np.pad(codes, (0, count - len(codes)), constant_values=ABSENT)

    def counts(self) -> list[tuple[str, int]]:
        """Returns (value, count of the products that have it) for each value, most common first."""
        counts = Counter(self._codes)
        rows = [(value, counts[code]) for value, code in self._values.items()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))

    def find(self, name: str, values: Sequence[str]) -> list[int]:
        """Returns the codes of values; raises UserError, with the attribute's `name`, if no product has one of them."""
        for value in values:
            if value not in self._values:
                raise UserError(f"filter: no product has {name} {value!r}{_suggestion(value, self._values)}")
        return [self._values[value] for value in values]


def _suggestion(name: str, names: Iterable[str]) -> str:
    closest = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {closest[0]!r}?" if closest else ""
