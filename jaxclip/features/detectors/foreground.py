"""Segments the product in a photo by its difference from the background, without a trained model.

The background is modelled from the picture's border: a smooth surface in CIELAB (white, grey, gradients, vignettes),
plus other colours that fill the corners (a floor under a wall). Pixels far from the background are the product, except
for its soft shadow. If the border does not fit this model, colour histograms of the middle and of the border separate
the product from the background, as in GrabCut (Rother et al. 2004), with a blur instead of the graph cut.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxclip.errors import UserError
from jaxclip.features.detectors.background import FAR, approximate_lab, length, model_background
from jaxclip.features.detectors.detections import NONE, Detections

LABEL = "product"
WORKING_SIDE = 128
"""Longer side, in pixels, to which larger pictures are reduced before they are segmented."""

_MAX_PLAIN_SPREAD = 1.75  # standard deviation, in CIELAB units, up to which a background counts as plain
_MIN_EXPLAINED = 0.5  # share of the border that the model of a plain background must explain
_MIN_PLAIN_SCORE = 0.35  # smallest score of a product in front of a plain background; noise scores up to 0.3
_MIN_BUSY_SCORE = 0.1  # smallest score of a product in front of a busy background; noise scores up to 0.02
# Width and height of the prior for a product in front of a busy background, as shares of half the sides.
_PRIOR_SIZE = (0.6, 0.88)
_MIN_AREA = 0.003  # share of the picture below which a product is ignored
_MIN_PIECE = 0.03  # smallest area of a piece of the product, relative to the largest piece
_MIN_BORDER_PIECE = 0.3  # the same for a piece that touches the picture's border
_MAX_SHADOW_DEPTH = 45.0  # largest loss of lightness in a shadow
_MAX_SHADOW_EDGE = 8.0  # change of lightness per pixel of a picture of WORKING_SIDE that is too sharp for a shadow
_MIN_HOLE = 0.01  # share of the picture from which a gap in a strongly coloured product is a real hole
_STRONG_DISTANCE = 3 * FAR  # median distance from which a product's colour is clearly not that of the background
_MIN_WITHOUT_SHADOW = 0.5  # share of product and shadow that must remain after the shadow is removed
_BINS = 16  # bins per axis of the colour histograms


def foreground_mask(image: np.ndarray) -> np.ndarray:
    """Returns (height, width) bool: True at the product's pixels; all False if no product is detected.

    Args:
      image: (height, width, 3) uint8 RGB of any size.
    """
    return _upscale(_segment(image)[0], image)


class Foreground:
    """The detector `foreground`: at most one box per picture, around the whole product and labelled "product"."""

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [_detect(image) for image in images]


def _detect(image: np.ndarray) -> Detections:
    mask, score = _segment(image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return replace(NONE, mask=_upscale(mask, image))
    height, width = mask.shape
    box = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    return replace(Detections.of([box], [score], [LABEL]), mask=_upscale(mask, image))


def _upscale(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Returns the mask scaled from working size to the size of the image."""
    height, width = image.shape[:2]
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def _segment(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the product's mask at working size, and its contrast with the background as a score from 0 to 1.

    If no product is found, the mask is all False and the score 0.
    """
    small = _downscale(image)
    nothing = np.zeros(small.shape[:2], bool), 0.0
    if min(small.shape[:2]) < 8:
        return nothing
    lab = approximate_lab(small)
    background = model_background(lab)
    distance = background.distance
    if background.explained < _MIN_EXPLAINED or background.spread > _MAX_PLAIN_SPREAD:
        mask, score = _separate_by_colour(lab, distance)
        is_product = score >= _MIN_BUSY_SCORE
    else:
        mask = _separate_by_distance(distance, background.offset)
        far = distance[mask & (distance > FAR)]
        score = background.explained * (1 - FAR / float(far.mean())) if far.size else 0.0
        is_product = score >= _MIN_PLAIN_SCORE
    return (mask, score) if is_product and mask.mean() >= _MIN_AREA else nothing


def _separate_by_distance(distance: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the mask of the product in front of a plain background, without its shadow."""
    far = distance > FAR
    mask = _clean(far & ~_shadow(far, offset), distance)
    # If little remains, a pale product was mistaken for a shadow.
    return mask if mask.sum() >= _MIN_WITHOUT_SHADOW * _fill_holes(far).sum() else _clean(far, distance)


def _downscale(image: np.ndarray) -> np.ndarray:
    """Returns the image at working size; a smaller image is returned unchanged."""
    height, width = image.shape[:2]
    scale = WORKING_SIDE / max(height, width)
    if scale >= 1:
        return image
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _shadow(far: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Returns the mask of the background that reaches the picture's border, with the product's shadow on it.

    A shadow is darker than the background, has nearly the same hue and no sharp edge.
    """
    lightness = offset[..., 0]
    tint = length(offset[..., 1:])
    shaded = (lightness < 0) & (lightness > -_MAX_SHADOW_DEPTH) & (tint < 3 - 0.12 * lightness)
    down, right = np.abs(np.diff(lightness, axis=0)), np.abs(np.diff(lightness, axis=1))
    edge = np.zeros_like(lightness)
    np.maximum(edge[1:], down, out=edge[1:])
    np.maximum(edge[:-1], down, out=edge[:-1])
    np.maximum(edge[:, 1:], right, out=edge[:, 1:])
    np.maximum(edge[:, :-1], right, out=edge[:, :-1])
    smooth = shaded & (edge < _MAX_SHADOW_EDGE * WORKING_SIDE / max(far.shape))
    # Eroded first, so that the shadow does not leak into the product through a gap of a pixel or two in its outline.
    regions, _ = ndimage.label(_erode(~far | smooth))
    border = _border(np.where(far, 0, regions))
    reached = _select(regions, border[border > 0])
    for _ in range(2):
        reached = _dilate(reached) & (shaded | ~far)
    return reached


def _select(regions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the mask of the regions with these labels."""
    selected = np.zeros(regions.max() + 1, bool)
    selected[labels] = True
    return selected[regions]


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Returns the mask with the four neighbours of each of its pixels."""
    dilated = mask.copy()
    dilated[1:] |= mask[:-1]
    dilated[:-1] |= mask[1:]
    dilated[:, 1:] |= mask[:, :-1]
    dilated[:, :-1] |= mask[:, 1:]
    return dilated


def _erode(mask: np.ndarray) -> np.ndarray:
    """Returns the mask without its outermost pixels; the picture's border does not count as an edge of the mask."""
    return ~_dilate(~mask)


def _separate_by_colour(lab: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the mask of the colours in the middle, and how well they are separated from other colours, from 0 to 1.

    Four iterations combine colour likelihoods from histograms with a prior that favours the middle, and blur the
    result.
    """
    height, width = lab.shape[:2]
    y, x = (np.arange(side, dtype=np.float32) / side * 2 - 1 for side in (height, width))
    prior = np.exp(-np.square(x / _PRIOR_SIZE[0]) - np.square(y / _PRIOR_SIZE[1])[:, None]) * 0.9 + 0.02
    low = lab.min(axis=(0, 1))
    step = np.maximum(lab.max(axis=(0, 1)) - low, 1) * (1.001 / _BINS)
    bins = ((lab - low) / step).astype(np.int32) @ np.array([_BINS * _BINS, _BINS, 1], np.int32)
    posterior = prior * distance / (distance + FAR)
    for _ in range(4):
        product, background = _histogram(bins, posterior), _histogram(bins, 1 - posterior)
        likelihood = (product / (product + background))[bins]
        posterior = likelihood * prior / (likelihood * prior + (1 - likelihood) * (1 - prior))
        posterior = ndimage.gaussian_filter(posterior, 0.015 * max(height, width))
    mask = _clean(posterior > 0.5, distance)
    return mask, max(2 * float(likelihood[mask].mean()) - 1, 0.0) if mask.any() else 0.0


def _histogram(bins: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns the smoothed colour histogram of weighted pixels, which sums to 1."""
    counts = np.bincount(bins.ravel(), weight.ravel(), _BINS**3).reshape(_BINS, _BINS, _BINS)
    counts = ndimage.gaussian_filter(counts, 0.8).ravel() + 1e-3
    return counts / counts.sum()


def _product_labels(regions: np.ndarray) -> np.ndarray:
    """Returns the labels of the product's regions: the largest, and all others that are not small compared with it.

    The largest is found with more weight on pixels in the middle. A region that touches the border must be larger.
    """
    height, width = regions.shape
    y, x = (np.abs(np.arange(side, dtype=np.float32) / side * 2 - 1) for side in (height, width))
    central = (1.2 - y[:, None]) * (1.2 - x)
    weight = np.bincount(regions.ravel(), central.ravel())
    areas = np.bincount(regions.ravel())
    weight[0] = 0
    largest = weight.argmax()
    min_areas = np.full(len(areas), max(_MIN_PIECE * areas[largest], 4))
    min_areas[_border(regions)] = _MIN_BORDER_PIECE * areas[largest]
    kept = areas >= min_areas
    kept[0], kept[largest] = False, True
    return np.flatnonzero(kept)


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Returns the mask with its holes filled.

    Unlike scipy's `binary_fill_holes`, it does not need one pass per pixel of depth.
    """
    regions, _ = ndimage.label(~mask)
    outside = _select(regions, _border(regions))
    outside[mask] = False
    return ~outside


def _border(values: np.ndarray) -> np.ndarray:
    """Returns the values at the border of a picture; the corners occur twice."""
    return np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])


def _clean(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Returns the mask without specks, and with its holes filled except for those that show the background."""
    mask = _erode(_dilate(mask))
    regions, count = ndimage.label(_fill_holes(mask), np.ones((3, 3), int))
    if not count:
        return mask
    product = _select(regions, _product_labels(regions))
    # Background colour inside a pale product may belong to it; inside a strongly coloured product it is a real hole.
    if np.median(distance[product & mask]) < _STRONG_DISTANCE:
        return product
    holes, count = ndimage.label(product & ~mask)
    if count:
        areas = np.bincount(holes.ravel())
        far = np.bincount(holes.ravel(), distance.ravel()) / areas
        real = (areas >= _MIN_HOLE * mask.size) & (far < 1)
        real[0] = False
        product &= ~_dilate(real[holes]) | mask
    return product


def make(argument: str) -> Foreground:
    """Returns the detector of the spec `foreground`, which has no argument."""
    if argument:
        raise UserError(f'the detector foreground takes no argument, but got "{argument}": write foreground')
    return Foreground()
