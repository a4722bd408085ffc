"""Measures how often the computed colours agree with the colour names in the catalogue."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from jaxclip.features.palette import MERGED

SEVERAL = "Multi"
"""The palette's name for a product of several colours."""
_NAMES = {name.casefold(): name for name in MERGED}
_MIN_SHARE = 0.5  # smallest share of colour names among all products' values of an attribute that holds colours


@dataclass(frozen=True, eq=False)
class Agreement:
    """Agreement for the products whose catalogue colour is a single colour of the palette.

    Attributes:
      compared: number of these products.
      left_out: number of products whose catalogue colour is missing or is not a single colour of the palette.
      exact: number of products whose dominant colour has the same name as in the catalogue.
      top1: number of products whose dominant colour has the same basic term (`palette.MERGED`).
      top3: number of products with that basic term among the first three of their stored colours.
      names: the N basic terms.
      confusion: (N, N) number of products per basic term of the catalogue (row) and of the dominant colour (column).
    """

    compared: int
    left_out: int
    exact: int
    top1: int
    top3: int
    names: tuple[str, ...]
    confusion: Int64[np.ndarray, "N N"]


def colour_attribute(attributes: Iterable[Mapping[str, str]]) -> str | None:
    """Returns the attribute whose values are colour names in the most products; None if no attribute qualifies.

    An attribute qualifies if its value is a colour name in at least half of the products that have the attribute.
    `attributes` holds the attributes of each product.
    """
    totals, colours = Counter(), Counter()
    for values in attributes:
        totals.update(values.keys())
        colours.update(name for name, value in values.items() if value.casefold() in _NAMES)
    shares = {name: colours[name] / totals[name] for name in colours}
    best = max(sorted(shares), key=lambda name: (shares[name] >= _MIN_SHARE, colours[name]), default=None)
    return best if best is not None and shares[best] >= _MIN_SHARE else None


def compare(named: Sequence[str], stored: Sequence[Sequence[str]]) -> Agreement:
    """Returns the agreement of catalogue colours with computed colours.

    Args:
      named: the colour of each product in the catalogue, "" if it is missing.
      stored: the names of each product's computed colours, dominant first.
    """
    names = tuple(sorted({term for term in MERGED.values() if term != SEVERAL}))
    indices = {name: index for index, name in enumerate(names)}
    confusion = np.zeros((len(names), len(names)), np.int64)
    exact = top3 = 0
    for catalogue_colour, colours in zip(named, stored, strict=True):
        name = _NAMES.get(catalogue_colour.casefold(), SEVERAL)
        if name == SEVERAL:
            continue
        term = MERGED[name]
        exact += colours[0] == name
        top3 += term in {MERGED[colour] for colour in colours[:3]}
        confusion[indices[term], indices[MERGED[colours[0]]]] += 1
    compared = int(confusion.sum())
    return Agreement(compared, len(named) - compared, exact, int(np.trace(confusion)), top3, names, confusion)
