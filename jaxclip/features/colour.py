"""Computes the dominant colours of a product, their names, and its colour histogram."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8
from skimage.color import deltaE_ciede2000, lab2rgb, rgb2hsv, rgb2lab
from sklearn import config_context
from sklearn.cluster import KMeans

from jaxclip.features.palette import PROTOTYPES

BINS = (8, 3, 4)
"""Default numbers of hue, saturation and value bins of `colour_histogram`."""

# Largest number of bins that are clustered: the chunk size of scikit-learn, within which the order of additions, and so
# the result, does not depend on the number of threads.
_MAX_BINS = 256
_MIN_CLUSTERS = 6  # more than the usual 3 colours, so that shades of one hue can be merged afterwards
_LIGHTNESS_WEIGHT = 0.5  # in clustering: folds change the lightness of cloth, hardly its hue
_MERGE_DIFFERENCE = 8.0  # CIEDE2000 difference with kL = 2 below which two clusters are merged into one colour
_MIN_SATURATION = 0.12  # HSV saturation below which a pixel counts as grey

_NAMES = tuple(name for name, prototypes in PROTOTYPES.items() for _ in prototypes)
_PROTOTYPES = rgb2lab(np.array([[*bytes.fromhex(rgb)] for rgbs in PROTOTYPES.values() for rgb in rgbs], np.uint8))


@dataclass(frozen=True, eq=False)
class Tally:
    """RGB histogram of a product's pixels, from which all colour features are computed.

    Attributes:
      codes: (B,) the B non-empty bins in ascending order; a code joins the high bits of red, green and blue.
      sums: (B, 3) sum of each channel over the pixels of each bin.
      counts: (B,) number of pixels in each bin.
    """

    codes: Int[np.ndarray, "B"]
    sums: Float[np.ndarray, "B 3"]
    counts: Float[np.ndarray, "B"]

    @property
    def means(self) -> Float[np.ndarray, "B 3"]:
        """Mean colour of each bin, 0 to 255."""
        return self.sums / self.counts[:, None]

    def coarsen(self) -> "Tally":
        """Returns this histogram, which must have 5 bits per channel, at 4 bits per channel."""
        red, green, blue = (self.codes >> shift & 31 for shift in (10, 5, 0))
        return _accumulate(red >> 1 << 8 | green >> 1 << 4 | blue >> 1, self.sums.T, self.counts, 8**4)


def tally(pixels: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "H W"]) -> Tally:
    """Returns the histogram, at 5 bits per channel, of the pixels in `mask`, or of all pixels if the mask is empty.

    Args:
      pixels: a picture or a crop of it, sRGB.
      mask: True at the product's pixels.

    Raises:
      ValueError: the shapes or dtypes are wrong, or there is no pixel.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[:2] != mask.shape or not mask.size:
        raise ValueError(f"expected pixels (H, W, 3) and a mask (H, W), got {pixels.shape} and {mask.shape}")
    if pixels.dtype != np.uint8 or mask.dtype != np.bool_:
        raise ValueError(f"expected uint8 pixels and a bool mask, got {pixels.dtype} and {mask.dtype}")
    selected = pixels[mask]
    selected = selected if len(selected) else pixels.reshape(-1, 3)
    red, green, blue = (selected[:, channel].astype(np.intp) for channel in range(3))
    codes = red >> 3 << 10 | green >> 3 << 5 | blue >> 3
    return _accumulate(codes, (red, green, blue), None, 8**5)


def _accumulate(codes: np.ndarray, channels: Iterable[np.ndarray], counts: np.ndarray | None, size: int) -> Tally:
    """Returns the histogram that sums the entries of each code; the sums are of integers, so exact in any order.

    Args:
      codes: (N,) code of each entry, less than `size`.
      channels: (N,) red, green and blue of each entry.
      counts: (N,) number of pixels of each entry; None if each entry is one pixel.
      size: number of possible codes.
    """
    totals = np.bincount(codes, weights=counts, minlength=size)
    non_empty = np.flatnonzero(totals)
    sums = [np.bincount(codes, weights=channel, minlength=size)[non_empty] for channel in channels]
    return Tally(non_empty, np.stack(sums, axis=1), totals[non_empty].astype(np.float64))


@dataclass(frozen=True, eq=False)
class Colours:
    """The colours of a product, dominant first.

    Attributes:
      rgb: (k, 3) uint8, sRGB.
      lab: (k, 3) float32, CIELAB under D65, lightness from 0 to 100.
      shares: (k,) float32, share of each colour in the pixels, in descending order; they sum to 1. If a product has
        fewer than k colours, its dominant colour is repeated with share 0.
      names: the name of each colour in `palette.PROTOTYPES`.
    """

    rgb: UInt8[np.ndarray, "k 3"]
    lab: Float32[np.ndarray, "k 3"]
    shares: Float32[np.ndarray, "k"]
    names: tuple[str, ...]


def colours(rgb_histogram: Tally, k: int = 3) -> Colours:
    """Returns the k dominant colours of the product.

    The 256 fullest bins at 4 bits per channel, each represented by its mean colour, are clustered by k-means in CIELAB
    with lightness at half weight. The initial centres are those of k-means++ with each random draw replaced by the
    likeliest bin, so the result is deterministic. Clusters closer than a CIEDE2000 difference of 8 with kL = 2, the
    value for textiles (CIE 142-2001), are then merged, nearest first, and merging continues until at most k are left,
    so that shadows and highlights count towards the cloth on which they lie. When two are merged, the one with the
    larger share keeps its value and gets the share of the other. The positions of the pixels do not matter.

    Raises:
      ValueError: k is less than 1.
    """
    if k < 1:
        raise ValueError(f"expected at least 1 colour, got k = {k}")
    coarse = rgb_histogram.coarsen()
    fullest = np.argsort(-coarse.counts, kind="stable")[:_MAX_BINS]
    lab, counts = to_lab(coarse.means[fullest]), coarse.counts[fullest]
    centres, shares = _merge_shades(*_cluster(lab, counts, max(_MIN_CLUSTERS, k)), k)
    order = np.argsort(-shares, kind="stable")
    order = np.concatenate([order, np.repeat(order[:1], k - len(order))])
    shares = np.where(np.arange(k) < len(shares), shares[order], 0.0)
    lab = centres[order]  # (k, 3)
    rgb = np.rint(np.clip(lab2rgb(lab), 0, 1) * 255).astype(np.uint8)
    return Colours(rgb, lab.astype(np.float32), shares.astype(np.float32), _nearest_names(lab))


def colour_name(lab: Float[np.ndarray, "3"]) -> str:
    """Returns the name in `palette.PROTOTYPES` whose prototype is nearest to a CIELAB colour by CIEDE2000 (kL = 1)."""
    return _nearest_names(np.asarray(lab, np.float64)[None])[0]


def to_lab(rgb: UInt8[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """Returns the CIELAB values, under D65, of sRGB colours from 0 to 255."""
    return rgb2lab(np.asarray(rgb, np.float64) / 255)


def histogram_size(bins: tuple[int, int, int] = BINS) -> int:
    """Returns B, the length of a `colour_histogram`."""
    hues, saturations, values = bins
    return (hues * saturations + 1) * values


def colour_histogram(rgb_histogram: Tally, bins: tuple[int, int, int] = BINS) -> Float32[np.ndarray, "B"]:
    """Returns (B,) the shares of HSV colours among the pixels, which sum to 1.

    B = hues * saturations * values + values. The first bins count pixels with a hue (saturation of at least 0.12), in
    the order hue, saturation, value; hue bins are centred, so that red is a single bin. The last bins count greys,
    black first. Every pixel is treated as having the mean colour of its RGB bin.

    Args:
      rgb_histogram: the RGB histogram of a product.
      bins: numbers of hue, saturation and value bins.

    Raises:
      ValueError: a number of bins is less than 1.
    """
    if min(bins) < 1:
        raise ValueError(f"expected at least 1 hue, 1 saturation and 1 value, got {bins}")
    hues, saturations, values = bins
    hsv = rgb2hsv(rgb_histogram.means / 255)  # (B, 3), a row per non-empty bin
    hue = np.floor(hsv[:, 0] * hues + 0.5).astype(np.intp) % hues
    saturation = (hsv[:, 1] - _MIN_SATURATION) / (1 - _MIN_SATURATION)
    saturation = (saturation * saturations).astype(np.intp).clip(0, saturations - 1)
    value = (hsv[:, 2] * values).astype(np.intp).clip(0, values - 1)
    with_hue = (hue * saturations + saturation) * values + value
    index = np.where(hsv[:, 1] >= _MIN_SATURATION, with_hue, hues * saturations * values + value)
    histogram = np.bincount(index, weights=rgb_histogram.counts, minlength=histogram_size(bins))
    return (histogram / rgb_histogram.counts.sum()).astype(np.float32)


def _cluster(
    lab: Float[np.ndarray, "B 3"], counts: Float[np.ndarray, "B"], k: int
) -> tuple[Float[np.ndarray, "K 3"], Float[np.ndarray, "K"]]:
    """Returns the mean colours and the shares of at most k non-empty clusters of B bins."""
    if len(lab) <= k:
        return lab, counts / counts.sum()
    points = lab * (_LIGHTNESS_WEIGHT, 1, 1)
    initial = [int(counts.argmax())]
    nearest = np.full(len(lab), np.inf)
    while len(initial) < k:
        nearest = np.minimum(nearest, ((points - points[initial[-1]]) ** 2).sum(axis=1))
        initial.append(int((counts * nearest).argmax()))
    # The arguments are valid by construction, and checking them takes longer than the clustering itself.
    with config_context(assume_finite=True, skip_parameter_validation=True):
        means = KMeans(k, init=points[initial], n_init=1, max_iter=20, random_state=0)
        labels = means.fit(points, sample_weight=counts).labels_
    weights = np.bincount(labels, weights=counts, minlength=k)
    sums = np.stack([np.bincount(labels, weights=counts * axis, minlength=k) for axis in lab.T], 1)
    non_empty = weights > 0
    return sums[non_empty] / weights[non_empty, None], weights[non_empty] / weights.sum()


def _merge_shades(
    lab: Float[np.ndarray, "K 3"], shares: Float[np.ndarray, "K"], k: int
) -> tuple[Float[np.ndarray, "M 3"], Float[np.ndarray, "M"]]:
    """Returns at most k distinct colours and their shares; of K clusters, similar ones are merged into the larger."""
    shares = shares.copy()
    difference = deltaE_ciede2000(lab[:, None], lab[None], kL=2)  # (K, K)
    np.fill_diagonal(difference, np.inf)
    remaining = len(shares)
    while remaining > 1:
        a, b = np.unravel_index(difference.argmin(), difference.shape)
        if remaining <= k and difference[a, b] >= _MERGE_DIFFERENCE:
            break
        larger, smaller = (a, b) if shares[a] >= shares[b] else (b, a)
        shares[larger] += shares[smaller]
        shares[smaller] = 0
        difference[smaller] = difference[:, smaller] = np.inf
        remaining -= 1
    return lab[shares > 0], shares[shares > 0]


def _nearest_names(lab: Float[np.ndarray, "N 3"]) -> tuple[str, ...]:
    nearest = deltaE_ciede2000(lab[:, None], _PROTOTYPES[None]).argmin(axis=1)
    return tuple(_NAMES[index] for index in nearest)
