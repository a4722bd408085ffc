"""Agreement of the computed colours with the colour names in the catalogue."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from jaxclip.features.palette import MERGED

SEVERAL = "Multi"
_BY_NAME = {name.casefold(): name for name in MERGED}
_MOST_NAMES = 0.5  # share of an attribute's values that have to be colours before it is one


@dataclass(frozen=True, eq=False)
class Agreement:
    """Stored colours against a catalogue's own, over the products where that is a single colour of the palette.

    Attributes:
      compared: number of products.
      left_out: number of products without such a colour.
      exact: products whose dominant colour has the very name.
      top1: products whose dominant colour has the same basic term (`palette.MERGED`).
      top3: products of which one of the stored colours has it.
      names: N basic terms.
      confusion: (N, N) products by the catalogue's term (row) and the dominant colour's (column).
    """

    compared: int
    left_out: int
    exact: int
    top1: int
    top3: int
    names: tuple[str, ...]
    confusion: Int64[np.ndarray, "N N"]


def colour_attribute(attributes: Iterable[Mapping[str, str]]) -> str | None:
    """Returns the attribute whose values are colour names most often, None where no attribute's are by half."""
    filled, colours = Counter(), Counter()
    for values in attributes:
        filled.update(values.keys())
        colours.update(name for name, value in values.items() if value.casefold() in _BY_NAME)
    shares = {name: colours[name] / filled[name] for name in colours}
    best = max(sorted(shares), key=lambda name: (shares[name] >= _MOST_NAMES, colours[name]), default=None)
    return best if best is not None and shares[best] >= _MOST_NAMES else None


def compare(named: Sequence[str], stored: Sequence[Sequence[str]]) -> Agreement:
    """Returns the agreement of what a catalogue says with the colours computed, dominant first; both N products."""
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
