"""Agreement of the computed colours with the colour names in the catalogue."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from jaxclip.features.palette import MERGED

SEVERAL = "Multi"
_BY_NAME = {name.casefold(): name for name in MERGED}
_MOST_NAMES = 0.5  # an attribute names colours if at least this share of its values are colour names


@dataclass(frozen=True, eq=False)
class Agreement:
    """Computed colours compared with the catalogue's, for products whose catalogue colour is one name of the palette.

    Attributes:
      compared: number of products.
      left_out: number of products whose catalogue colour is missing or is not a single colour of the palette.
      exact: number of products whose dominant colour has the same name as in the catalogue.
      top1: number of products whose dominant colour has the same basic term (`palette.MERGED`).
      top3: number of products with that basic term among their stored colours.
      names: N basic terms.
      confusion: (N, N) number of products by the catalogue's term (row) and the dominant colour's term (column).
    """

    compared: int
    left_out: int
    exact: int
    top1: int
    top3: int
    names: tuple[str, ...]
    confusion: Int64[np.ndarray, "N N"]


def colour_attribute(attributes: Iterable[Mapping[str, str]]) -> str | None:
    """Returns the attribute with the largest share of colour names among its values, None if no share reaches half."""
    filled, colours = Counter(), Counter()
    for values in attributes:
        filled.update(values.keys())
        colours.update(name for name, value in values.items() if value.casefold() in _BY_NAME)
    shares = {name: colours[name] / filled[name] for name in colours}
    best = max(sorted(shares), key=lambda name: (shares[name] >= _MOST_NAMES, colours[name]), default=None)
    return best if best is not None and shares[best] >= _MOST_NAMES else None


def compare(named: Sequence[str], stored: Sequence[Sequence[str]]) -> Agreement:
    """Returns the agreement of N products' catalogue colours with their computed colours, dominant colour first."""
    names = tuple(sorted({term for term in MERGED.values() if term != SEVERAL}))
    places = {name: place for place, name in enumerate(names)}
    confusion = np.zeros((len(names), len(names)), np.int64)
    exact = top3 = 0
    for said, found in zip(named, stored, strict=True):
        name = _BY_NAME.get(said.casefold(), SEVERAL)
        if name == SEVERAL:
            continue
        term = MERGED[name]
        exact += found[0] == name
        top3 += term in {MERGED[colour] for colour in found[:3]}
        confusion[places[term], places[MERGED[found[0]]]] += 1
    compared = int(confusion.sum())
    return Agreement(compared, len(named) - compared, exact, int(np.trace(confusion)), top3, names, confusion)
