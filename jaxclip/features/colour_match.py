"""Soft colour names: how well each name of the palette describes a product, similar names included."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32
from skimage.color import deltaE_ciede2000

from jaxclip.features.colour import to_lab
from jaxclip.features.palette import PROTOTYPES

NAMES = tuple(PROTOTYPES)
NEAR = 12.0
"""CIEDE2000 difference at which the similarity of two names is 1/e."""


def name_similarity() -> Float32[np.ndarray, "C C"]:
    """Returns exp(-(difference / NEAR)^2) for each pair of names; difference: CIEDE2000 of nearest prototypes."""
    looks = [to_lab(np.array([[*bytes.fromhex(look)] for look in looks], np.uint8)) for looks in PROTOTYPES.values()]
    apart = np.array([[deltaE_ciede2000(a[:, None], b[None]).min() for b in looks] for a in looks])
    return np.exp(-((apart / NEAR) ** 2)).astype(np.float32)


def soft_colours(names: Sequence[Sequence[str]], shares: Float[np.ndarray, "N k"]) -> Float32[np.ndarray, "N C"]:
    """Returns the share, in [0, 1], of each product that each name of the palette could describe in a search.

    Args:
      names: the palette names of each product's k colours.
      shares: the shares of these colours; 0 where a product has fewer than k.
    """
    similarity = name_similarity()
    number = {name: index for index, name in enumerate(NAMES)}
    chosen = np.array([[number[name] for name in of_product] for of_product in names])  # (N, k)
    return (np.asarray(shares, np.float32)[..., None] * similarity[chosen]).sum(axis=1)
