"""Segments the product in a photo by how it differs from the background, without a trained model.

The background is modelled from the picture's border: a smooth surface in CIELAB (white, grey, gradients, vignettes),
plus other colours that fill the corners (a floor under a wall). Pixels far from the background that are not its soft
shadow are the product. Where the border does not fit this model, colour histograms of the middle and the border
separate product from background, as in GrabCut (Rother et al., 2004), with a blur in place of the graph cut.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxclip.errors import UserError
from jaxclip.features.detectors.background import FAR, length, model_background, quick_lab
from jaxclip.features.detectors.detections import NONE, Detections

LABEL = "product"
WORKING_SIDE = 128
"""Pixels of the longer side at which pictures are segmented."""

_PLAIN = 1.75  # CIELAB units of deviation up to which a background is plain.
_MIDDLE = (
    0.6,
    0.88,
)  # Width and height of the prior for the product in front of a busy background, as shares of half the sides.
_LEAST_CLARITY = 0.35  # Least score in front of a plain background; noise scores up to 0.3.
_LEAST_DIFFERENCE = 0.1  # Least score in front of a busy background; noise scores up to 0.02.
_STUDIO = 0.5  # Share of the border that the background model must explain.
_LEAST_AREA = 0.003  # A product that covers a smaller share of the picture is ignored.
_LEAST_PIECE = 0.03  # Smallest area of a piece, relative to the largest piece.
_LEAST_AT_EDGE = 0.3  # Smallest relative area of a piece that touches the picture's edge.
_DEEPEST_SHADOW = 45.0  # Largest loss of lightness in a shadow.
_SHADOW_EDGE = 8.0  # Change of lightness per pixel from which an edge is too sharp for a shadow.
_TRUE_HOLE = 0.01  # Share of the picture from which a gap in a strongly coloured product is a real hole.
_STRONG = 3 * FAR  # Median distance from which a product's colour is clearly not the background's.
_LEAST_LIT = 0.5  # Least share of product and shadow that must remain without the shadow.
_BINS = 16  # Bins per axis of the colour histograms.


def foreground_mask(image: np.ndarray) -> np.ndarray:
    """Returns (height, width) bool: True at the product's pixels; all False if there is no product.

    Args:
      image: (height, width, 3) uint8 RGB of any size.
    """
    return _enlarged(_segment(image)[0], image)


class Foreground:
    """The detector `foreground`: one box around the whole product, labelled "product", or none."""

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [_detect(image) for image in images]


def _detect(image: np.ndarray) -> Detections:
    mask, score = _segment(image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return replace(NONE, mask=_enlarged(mask, image))
    height, width = mask.shape
    box = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    return replace(Detections.of([box], [score], [LABEL]), mask=_enlarged(mask, image))


def _enlarged(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the mask scaled from working size to the size of the picture."""
    height, width = image.shape[:2]
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _segment(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mask at working size, and how clearly the product stands out, 0 to 1."""
    small = _reduced(image)
    nothing = np.zeros(small.shape[:2], bool), 0.0
    if min(small.shape[:2]) < 8:
        return nothing
    lab = quick_lab(small)
    background = model_background(lab)
    distance = background.distance
    if background.explained < _STUDIO or background.spread > _PLAIN:
        mask, clarity = _separate_by_colour(lab, distance)
        sure = clarity >= _LEAST_DIFFERENCE
    else:
        mask = _without_shadow(distance, background.offset)
        far = distance[mask & (distance > FAR)]
        clarity = background.explained * (1 - FAR / float(far.mean())) if far.size else 0.0
        sure = clarity >= _LEAST_CLARITY
    return (mask, clarity) if sure and mask.mean() >= _LEAST_AREA else nothing


def _without_shadow(distance: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the mask of the product in front of a plain background, without its shadow."""
    far = distance > FAR
    mask = _pieces(far & ~_shadow(far, offset), distance)
    # If little remains, a pale product was mistaken for a shadow.
    return mask if mask.sum() >= _LEAST_LIT * _filled(far).sum() else _pieces(far, distance)


def _reduced(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    scale = WORKING_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _shadow(far: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the shadow's mask: darker background of the same hue, connected to it without a sharp edge."""
    lightness = offset[..., 0]
    tint = length(offset[..., 1:])
    shaded = (lightness < 0) & (lightness > -_DEEPEST_SHADOW) & (tint < 3 - 0.12 * lightness)
    down, right = np.abs(np.diff(lightness, axis=0)), np.abs(np.diff(lightness, axis=1))
    edge = np.zeros_like(lightness)
    np.maximum(edge[1:], down, out=edge[1:])
    np.maximum(edge[:-1], down, out=edge[:-1])
    np.maximum(edge[:, 1:], right, out=edge[:, 1:])
    np.maximum(edge[:, :-1], right, out=edge[:, :-1])
    smooth = shaded & (edge < _SHADOW_EDGE * WORKING_SIDE / max(far.shape))
    # Shrunk first, so that a shadow does not leak into the product through a gap of a pixel or two in its outline.
    parts, _ = ndimage.label(_shrunk(~far | smooth))
    seeds = np.where(far, 0, parts)
    rim = _rim(seeds)
    reached = _members(parts, rim[rim > 0])
    for _ in range(2):
        reached = _grown(reached) & (shaded | ~far)
    return reached


def _members(parts: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    chosen = np.zeros(parts.max() + 1, bool)
    chosen[numbers] = True
    return chosen[parts]


def _grown(mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """Returns the mask without its outermost pixels; those at the picture's edge stay."""
    return ~_grown(~mask)


def _separate_by_colour(lab: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mask of the colours in the middle, and their separability from the border's, 0 to 1.

    Four iterations combine colour likelihoods from histograms with a prior that favours the middle, and blur it.
    """
    height, width = lab.shape[:2]
    y, x = (np.arange(side, dtype=np.float32) / side * 2 - 1 for side in (height, width))
    prior = np.exp(-np.square(x / _MIDDLE[0]) - np.square(y / _MIDDLE[1])[:, None]) * 0.9 + 0.02
    low = lab.min(axis=(0, 1))
    step = np.maximum(lab.max(axis=(0, 1)) - low, 1) * (1.001 / _BINS)
    bins = ((lab - low) / step).astype(np.int32) @ np.array([_BINS * _BINS, _BINS, 1], np.int32)
    belief = prior * distance / (distance + FAR)
    for _ in range(4):
        inner, outer = _histogram(bins, belief), _histogram(bins, 1 - belief)
        likelihood = (inner / (inner + outer))[bins]
        belief = likelihood * prior / (likelihood * prior + (1 - likelihood) * (1 - prior))
        belief = ndimage.gaussian_filter(belief, 0.015 * max(height, width))
    mask = _pieces(belief > 0.5, distance)
    return mask, max(2 * float(likelihood[mask].mean()) - 1, 0.0) if mask.any() else 0.0


def _histogram(bins: np.ndarray, weight: np.ndarray) -> np.ndarray:
    counts = np.bincount(bins.ravel(), weight.ravel(), _BINS**3).reshape(_BINS, _BINS, _BINS)
    counts = ndimage.gaussian_filter(counts, 0.8).ravel() + 1e-3
    return counts / counts.sum()


def _product_pieces(parts: np.ndarray) -> np.ndarray:
    """Returns the labels of the product's pieces: the largest, with more weight in the middle, and others.

    A region that touches the border is kept only if it is a large part of the product.
    """
    height, width = parts.shape
    y, x = (np.abs(np.arange(side, dtype=np.float32) / side * 2 - 1) for side in (height, width))
    central = (1.2 - y[:, None]) * (1.2 - x)
    weight = np.bincount(parts.ravel(), central.ravel())
    areas = np.bincount(parts.ravel())
    weight[0] = 0
    largest = weight.argmax()
    least = np.full(len(areas), max(_LEAST_PIECE * areas[largest], 4))
    least[_rim(parts)] = _LEAST_AT_EDGE * areas[largest]
    kept = areas >= least
    kept[0], kept[largest] = False, True
    return np.flatnonzero(kept)


def _filled(mask: np.ndarray) -> np.ndarray:
    """Returns the mask with its holes filled; scipy's `binary_fill_holes` needs one pass per pixel of depth."""
    parts, _ = ndimage.label(~mask)
    outside = _members(parts, _rim(parts))
    outside[mask] = False
    return ~outside


def _rim(parts: np.ndarray) -> np.ndarray:
    return np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])


def _pieces(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Returns the largest piece and others that are not specks, with all holes filled except real ones."""
    mask = _shrunk(_grown(mask))
    parts, count = ndimage.label(_filled(mask), np.ones((3, 3), int))
    if not count:
        return mask
    product = _members(parts, _product_pieces(parts))
    # Background colour inside a pale product may be the product; inside a strongly coloured one it is a real hole.
    if np.median(distance[product & mask]) < _STRONG:
        return product
    holes, count = ndimage.label(product & ~mask)
    if count:
        areas = np.bincount(holes.ravel())
        far = np.bincount(holes.ravel(), distance.ravel()) / areas
        true = (areas >= _TRUE_HOLE * mask.size) & (far < 1)
        true[0] = False
        product &= ~_grown(true[holes]) | mask
    return product


def make(argument: str) -> Foreground:
    """Returns the detector of `foreground`."""
    if argument:
        raise UserError(f'the detector foreground takes nothing after a colon, not "{argument}"')
    return Foreground()
