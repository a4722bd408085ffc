"""Measures the texture of a product by local binary patterns and co-occurrence statistics of its grey levels."""

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image
from scipy.ndimage import binary_erosion
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

SIZE = 96
"""Longer side, in pixels, to which the product is scaled before measuring its texture."""

_POINTS, _RADIUS = 8, 1
_LEVELS = 16
_DISTANCES = (2, 6)
_DIRECTIONS = {"across": 0.0, "down": np.pi / 2}
_MEASURES = ("contrast", "homogeneity", "energy", "correlation")

NAMES = tuple(f"lbp {pattern}" for pattern in range(_POINTS + 2)) + tuple(
    f"{measure} {distance} {direction}" for measure in _MEASURES for distance in _DISTANCES for direction in _DIRECTIONS
)
"""Entries of `texture`: ten patterns, then four measures at two distances in two directions."""


def texture(pixels: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]) -> Float32[np.ndarray, "T"]:
    """Returns the texture of the pixels in `mask`, or of all pixels if the mask is empty; `NAMES` names the T entries.

    The box around the mask is converted to grey (luma) and scaled to 96 pixels on its longer side. The first columns
    are the shares of the uniform local binary patterns (Ojala et al. 2002; 8 points, radius 1), which sum to 1. The
    others are contrast, homogeneity, energy and correlation (Haralick et al. 1973) of pairs of pixels at distances 2
    and 6, horizontally and vertically, in 16 grey levels; contrast is in squared levels. Only patterns and pairs inside
    the mask count. The mask is first eroded by one pixel, unless nothing would remain, so that the outline does not
    count as texture. Plain cloth has contrast 0, and homogeneity, energy and correlation 1; the same values are
    returned if no pair fits into the mask.

    Args:
      pixels: a picture or a crop of it, sRGB.
      mask: True at the product's pixels.

    Raises:
      ValueError: the shapes do not match, or there is no pixel.
    """
    grey, inside = _scale(pixels, mask)  # (h, w)
    patterns = local_binary_pattern(grey, _POINTS, _RADIUS, "uniform")[inside].astype(np.intp)
    shares = np.bincount(patterns, minlength=_POINTS + 2) / len(patterns)
    # Level 0 marks pixels outside the mask; its row and column of the matrix are dropped.
    levels = np.where(inside, grey // (256 // _LEVELS) + 1, 0).astype(np.uint8)
    pairs = graycomatrix(levels, _DISTANCES, list(_DIRECTIONS.values()), _LEVELS + 1, symmetric=True)[1:, 1:]
    pairs[0, 0] += (pairs.sum(axis=(0, 1)) == 0).astype(pairs.dtype)
    measures = [graycoprops(pairs, measure).reshape(-1) for measure in _MEASURES]
    return np.concatenate([shares, *measures]).astype(np.float32)


def _scale(
    pixels: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]
) -> tuple[UInt8[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Returns the box around the mask in grey, scaled to `SIZE`, and the mask in it without its edge."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[:2] != mask.shape or not mask.size:
        raise ValueError(f"expected pixels (H, W, 3) and a mask (H, W), got {pixels.shape} and {mask.shape}")
    if not mask.any():
        mask = np.ones_like(mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    size = max(1, round(width * SIZE / max(width, height))), max(1, round(height * SIZE / max(width, height)))
    grey = Image.fromarray(pixels).crop(box).convert("L").resize(size, Image.Resampling.BILINEAR)
    coverage = Image.fromarray(mask.astype(np.uint8) * 255).crop(box).resize(size, Image.Resampling.BOX)
    inside = np.asarray(coverage) > 127
    # Patterns cannot look beyond the box, so its border counts as an edge of the mask.
    eroded = binary_erosion(inside, np.ones((3, 3), np.bool_))
    everything = np.ones_like(inside)  # for a mask so sparse that it is empty after scaling
    return np.asarray(grey), next(candidate for candidate in (eroded, inside, everything) if candidate.any())
