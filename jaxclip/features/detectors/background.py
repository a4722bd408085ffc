"""Models the background by the picture's border: a smooth CIELAB surface, plus other colours that fill corners."""

from dataclasses import dataclass

import numpy as np

FAR = 3.2
"""Distance from the background, in standard deviations, beyond which a pixel does not belong to it."""

_NOISE = 1.3  # Standard deviation of JPEG noise on a plain background, in CIELAB units.


@dataclass(frozen=True, eq=False)
class Background:
    """The difference of a picture from its background, and how well the background fits.

    Attributes:
      offset: (height, width, 3) float32, the CIELAB difference of each pixel from the surface.
      distance: (height, width) float32, distance to the surface or to the nearest other colour, in standard
        deviations.
      spread: standard deviation of the border from the surface, in CIELAB units; JPEG noise alone gives 1.3.
      explained: share of the border that is background; a product cut off by the border lowers it.
    """

    offset: np.ndarray
    distance: np.ndarray
    spread: float
    explained: float


def model_background(lab: np.ndarray) -> Background:
    """Returns the background fitted to the border of a CIELAB picture (height, width, 3)."""
    height, width = lab.shape[:2]
    thick = max(1, round(0.02 * min(height, width)))
    ring = np.ones((height, width), bool)
    ring[thick:-thick, thick:-thick] = False
    border = lab[ring]
    y, x = (
        axis.astype(np.float32) / side * 2 - 1 for axis, side in zip(np.nonzero(ring), (height, width), strict=True)
    )
    terms = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    inside = _near_mode(border)
    for order in (3, 6, 6):
        surface = _fit(terms[inside, :order], border[inside])
        residual = length(border - terms[:, :order] @ surface)
        inside = residual < 3 * max(1.48 * float(np.median(residual[inside])), _NOISE)
    spread = np.sqrt(np.square(residual[inside]).mean() / 2 + _NOISE**2)
    offset = lab - _painted(surface, height, width)
    distance = length(offset) / spread
    explained = inside
    for mean, inverse in _other_modes(border, ~inside, _corners(height, width)[ring]):
        away = lab - mean
        distance = np.minimum(distance, np.sqrt(np.einsum("hwi,hwi->hw", away @ inverse, away)))
        explained = explained | (distance[ring] < FAR)
    return Background(offset, distance, float(spread), float(explained.mean()))


def _from_srgb() -> np.ndarray:
    value = np.arange(256) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _root() -> np.ndarray:
    value = np.arange(4097) / 4096
    return np.where(value > (6 / 29) ** 3, np.cbrt(value), value * (29 / 6) ** 2 / 3 + 4 / 29).astype(np.float32)


# Linear sRGB to XYZ relative to D65 white (so rows sum to 1), scaled to indices of the table of cube roots.
_TO_XYZ = 4096 * np.array(
    [[0.433953, 0.376219, 0.189828], [0.212671, 0.715160, 0.072169], [0.017758, 0.109477, 0.872765]], np.float32
)
_LINEAR, _ROOT = _from_srgb(), _root()


def quick_lab(image: np.ndarray) -> np.ndarray:
    """Returns (height, width, 3) float32, the CIELAB colours of an sRGB picture by look-up tables, exact to 0.3."""
    roots = _ROOT[(_LINEAR[image] @ _TO_XYZ.T + 0.5).astype(np.int32)]
    x, y, z = roots[..., 0], roots[..., 1], roots[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def length(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("...i,...i->...", vectors, vectors))


def _painted(surface: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns (height, width, 3), the surface with these coefficients at every pixel."""
    y = (np.arange(height, dtype=np.float32) / height * 2 - 1)[:, None, None]
    x = (np.arange(width, dtype=np.float32) / width * 2 - 1)[:, None]
    flat, across, down, across2, down2, mixed = surface
    return (flat + across * x + across2 * x * x) + (down * y + down2 * y * y) + y * (mixed * x)


def _near_mode(colours: np.ndarray) -> np.ndarray:
    """Returns (N,) bool: whether each colour is near the most frequent one."""
    bins = np.floor(colours / 8).astype(np.int64) @ np.array([1_000_000, 1000, 1])
    _, bin_of_colour, counts = np.unique(bins, return_inverse=True, return_counts=True)
    middle = colours[bin_of_colour == counts.argmax()].mean(axis=0)
    return length(colours - middle) < 14


def _fit(terms: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns (terms, 3): the surface's coefficients, regularised where the border does not determine them."""
    ridge = np.array([0.001, 0.02, 0.02, 0.05, 0.05, 0.05], np.float32)[: terms.shape[1]] * len(terms)
    middle = values.mean(axis=0)
    surface = np.linalg.solve(terms.T @ terms + np.diag(ridge), terms.T @ (values - middle))
    surface[0] += middle
    return surface


def _corners(height: int, width: int) -> np.ndarray:
    corners = np.zeros((height, width), bool)
    down, right = max(height // 8, 2), max(width // 8, 2)
    for rows in (slice(0, down), slice(-down, None)):
        for columns in (slice(0, right), slice(-right, None)):
            corners[rows, columns] = True
    return corners


def _other_modes(border: np.ndarray, left_over: np.ndarray, corners: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns mean and inverse covariance of the border's other colours that fill corners, as a floor does.

    Colours elsewhere on the border are ignored: a product cut off by the border touches it between the corners.
    """
    modes = []
    while len(modes) < 4 and left_over.sum() >= 0.05 * len(border):
        index = np.flatnonzero(left_over)
        near = index[_near_mode(border[index])]
        left_over = left_over.copy()
        left_over[near] = False
        if corners[near].sum() < 0.12 * corners.sum():
            continue
        away = border[near] - border[near].mean(axis=0)
        covariance = away.T @ away / len(near) + np.eye(3) * (2 * _NOISE) ** 2
        modes.append((border[near].mean(axis=0), np.linalg.inv(covariance).astype(np.float32)))
    return modes
