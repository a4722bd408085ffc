"""Models the background from the picture's border: a smooth surface in CIELAB, plus other colours that fill corners."""

from dataclasses import dataclass

import numpy as np

FAR = 3.2
"""Distance from the background, in standard deviations, beyond which a pixel does not belong to the background."""

_NOISE = 1.3  # assumed standard deviation of JPEG noise on a plain background, in CIELAB units


@dataclass(frozen=True, eq=False)
class Background:
    """The difference between a picture and its background model, and how well the model fits the border.

    Attributes:
      offset: (height, width, 3) float32, CIELAB difference of each pixel from the surface.
      distance: (height, width) float32, distance of each pixel from the surface or from the nearest other background
        colour, in standard deviations.
      spread: standard deviation of the border around the surface, in CIELAB units, plus 1.3 for JPEG noise (the squares
        are added), so that it is at least 1.3.
      explained: share of the border that is background; a product that touches the border lowers it.
    """

    offset: np.ndarray
    distance: np.ndarray
    spread: float
    explained: float


def model_background(lab: np.ndarray) -> Background:
    """Returns the background model fitted to the border of a CIELAB picture (height, width, 3)."""
    height, width = lab.shape[:2]
    thickness = max(1, round(0.02 * min(height, width)))
    on_border = np.ones((height, width), bool)
    on_border[thickness:-thickness, thickness:-thickness] = False
    border = lab[on_border]
    y, x = (
        axis.astype(np.float32) / side * 2 - 1
        for axis, side in zip(np.nonzero(on_border), (height, width), strict=True)
    )
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    inliers = _near_mode(border)
    for count in (3, 6, 6):  # first a plane, then a quadratic surface
        surface = _fit_surface(terms[inliers, :count], border[inliers])
        residual = length(border - terms[:, :count] @ surface)
        inliers = residual < 3 * max(1.48 * float(np.median(residual[inliers])), _NOISE)
    spread = np.sqrt(np.square(residual[inliers]).mean() / 2 + _NOISE**2)
    offset = lab - _evaluate_surface(surface, height, width)
    distance = length(offset) / spread
    explained = inliers
    for mean, inverse in _other_modes(border, ~inliers, _corners(height, width)[on_border]):
        deviation = lab - mean
        distance = np.minimum(distance, np.sqrt(np.einsum("hwi,hwi->hw", deviation @ inverse, deviation)))
        explained = explained | (distance[on_border] < FAR)
    return Background(offset, distance, float(spread), float(explained.mean()))


def _linear_table() -> np.ndarray:
    """Returns the linear value, from 0 to 1, of each of the 256 sRGB levels."""
    value = np.arange(256) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _root_table() -> np.ndarray:
    """Returns CIELAB's companding function, a cube root with a linear start, at 4097 values from 0 to 1."""
    value = np.arange(4097) / 4096
    return np.where(value > (6 / 29) ** 3, np.cbrt(value), value * (29 / 6) ** 2 / 3 + 4 / 29).astype(np.float32)


# Linear sRGB to XYZ relative to D65 white (so that rows sum to 1), scaled to indices of the table of cube roots.
_TO_XYZ = 4096 * np.array(
    [[0.433953, 0.376219, 0.189828], [0.212671, 0.715160, 0.072169], [0.017758, 0.109477, 0.872765]], np.float32
)
_LINEAR, _ROOT = _linear_table(), _root_table()


def approximate_lab(image: np.ndarray) -> np.ndarray:
    """Converts an sRGB picture to CIELAB, (height, width, 3) float32, by look-up tables; errors are at most 0.3."""
    roots = _ROOT[(_LINEAR[image] @ _TO_XYZ.T + 0.5).astype(np.int32)]
    x, y, z = roots[..., 0], roots[..., 1], roots[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def length(vectors: np.ndarray) -> np.ndarray:
    """Returns the Euclidean length of vectors along the last axis."""
    return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def _evaluate_surface(surface: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns (height, width, 3), the values of the quadratic surface with these coefficients at every pixel."""
    y = (np.arange(height, dtype=np.float32) / height * 2 - 1)[:, None, None]
    x = (np.arange(width, dtype=np.float32) / width * 2 - 1)[:, None]
    constant, cx, cy, cxx, cyy, cxy = surface
    return (constant + cx * x + cxx * x * x) + (cy * y + cyy * y * y) + y * (cxy * x)


def _near_mode(colours: np.ndarray) -> np.ndarray:
    """Returns (N,) bool: whether each of N CIELAB colours is near the most frequent colour."""
    bins = np.floor(colours / 8).astype(np.int64) @ np.array([1_000_000, 1000, 1])
    _, bin_of_colour, counts = np.unique(bins, return_inverse=True, return_counts=True)
    mode = colours[bin_of_colour == counts.argmax()].mean(axis=0)
    return length(colours - mode) < 14


def _fit_surface(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns (terms, 3) coefficients of the surface, regularised in case the border does not determine them."""
    ridge = np.array([0.001, 0.02, 0.02, 0.05, 0.05, 0.05], np.float32)[: terms.shape[1]] * len(terms)
    mean = values.mean(axis=0)
    surface = np.linalg.solve(terms.T @ terms + np.diag(ridge), terms.T @ (values - mean))
    surface[0] += mean
    return surface


def _corners(height: int, width: int) -> np.ndarray:
    """Returns (height, width) bool: True in the four corners, each an eighth of the sides."""
    corners = np.zeros((height, width), bool)
    down, right = max(height // 8, 2), max(width // 8, 2)
    for rows in (slice(0, down), slice(-down, None)):
        for columns in (slice(0, right), slice(-right, None)):
            corners[rows, columns] = True
    return corners


def _other_modes(border: np.ndarray, remaining: np.ndarray, corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (mean, inverse covariance) of up to 4 further colours of the border that fill corners, as a floor does.

    Colours elsewhere on the border are ignored, because a product that leaves the picture touches the border between
    the corners.

    Args:
      border: (N, 3) CIELAB colours of the border's pixels.
      remaining: (N,) bool, the pixels that are not explained yet.
      corners: (N,) bool, the pixels in corners.
    """
    modes = []
    while len(modes) < 4 and remaining.sum() >= 0.05 * len(border):
        index = np.flatnonzero(remaining)
        near = index[_near_mode(border[index])]
        remaining = remaining.copy()
        remaining[near] = False
        if corners[near].sum() < 0.12 * corners.sum():
            continue
        deviation = border[near] - border[near].mean(axis=0)
        covariance = deviation.T @ deviation / len(near) + np.eye(3) * (2 * _NOISE) ** 2
        modes.append((border[near].mean(axis=0), np.linalg.inv(covariance).astype(np.float32)))
    return modes
