"""Scores how well each colour name of the palette describes a product, with credit for similar colours."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32
from skimage.color import deltaE_ciede2000

from jaxclip.features.colour import to_lab
from jaxclip.features.palette import PROTOTYPES

NAMES = tuple(PROTOTYPES)
SIMILARITY_SCALE = 12.0
"""CIEDE2000 difference at which the similarity of two names is 1/e."""


def name_similarity() -> Float32[np.ndarray, "C C"]:
    """Returns exp(-(difference / SIMILARITY_SCALE)^2) for each pair of the C names in NAMES.

    The difference of two names is the CIEDE2000 difference of their nearest prototypes.
    """
    prototypes = [to_lab(np.array([[*bytes.fromhex(rgb)] for rgb in rgbs], np.uint8)) for rgbs in PROTOTYPES.values()]
    difference = np.array([[deltaE_ciede2000(a[:, None], b[None]).min() for b in prototypes] for a in prototypes])
    return np.exp(-((difference / SIMILARITY_SCALE) ** 2)).astype(np.float32)


def soft_colours(names: Sequence[Sequence[str]], shares: Float[np.ndarray, "N k"]) -> Float32[np.ndarray, "N C"]:
    """Returns, for each product, how well each of the C names of the palette describes its colours, from 0 to 1.

    Args:
      names: the palette names of each of N products' k colours.
      shares: the shares of these colours; a product with fewer than k colours has shares of 0.
    """
    similarity = name_similarity()
    indices = {name: index for index, name in enumerate(NAMES)}
    colours = np.array([[indices[name] for name in product] for product in names])  # (N, k)
    return (np.asarray(shares, np.float32)[..., None] * similarity[colours]).sum(axis=1)
