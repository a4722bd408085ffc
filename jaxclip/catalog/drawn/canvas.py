"""The canvas that one product is drawn on, which also records where each part is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.catalog.drawn.outlines import FINE, bounds, ribbon
from jaxclip.catalog.drawn.palette import RGB, PaletteColour, edge_of
from jaxclip.catalog.drawn.patterns import Cloth
from jaxclip.catalog.drawn.raster import PIXEL, Mask, coverage

UNITS = 1200  # The picture's width in the units that outlines are given in.
_FIELD = np.int64(1000)


@dataclass(frozen=True)
class Placement:
    """Position of the product in the picture.

    Attributes:
      size: in thousandths of the full size.
      tilt: in thousandths of a radian, clockwise.
      right: shift to the right in units (see UNITS).
      down: shift downwards in units.
      mirrored: whether left and right are exchanged.
    """

    size: int = 1000
    tilt: int = 0
    right: int = 0
    down: int = 0
    mirrored: bool = False


class Canvas:
    """A background on which parts are drawn one over another.

    Attributes:
      pixels: (height, width, 3) int32, 0 to 255.
      covered: (height, width) int32, 0 to 256: the highest opacity with which a shape was drawn at each pixel.
      owner: (height, width) int8: index in `parts` of the last part that covers at least half of each pixel, or -1.
      parts: name and colour of each part, in the order in which they were first drawn.
    """

    def __init__(self, background: np.ndarray, placement: Placement):
        self.pixels = background.astype(np.int32)
        self.height, self.width = background.shape[:2]
        self.covered = np.zeros((self.height, self.width), np.int32)
        self.owner = np.full((self.height, self.width), -1, np.int8)
        self.parts: list[tuple[str, PaletteColour]] = []
        self._placement = placement

    def part(
        self,
        name: str,
        outlines: Sequence[np.ndarray],
        colour: PaletteColour,
        cloth: Cloth | None = None,
        holes: Sequence[np.ndarray] = (),
        within: Mask | None = None,
        line: int = 9,
    ) -> Mask:
        """Draws a part with cloth, shading and an outline `line` wide, records it as `name`, and returns its mask."""
        mask = self.mask(outlines, holes)
        mask = mask.within(within) if within else mask
        self._blend(mask, colour.rgb)
        if (name, colour) not in self.parts:
            self.parts.append((name, colour))
        window = mask.window
        self.owner[window][mask.alpha >= PIXEL // 2] = self.parts.index((name, colour))
        if cloth:
            for figure in cloth.figures(bounds(outlines)):
                self._blend(self.mask(figure.outlines).within(mask), figure.rgb, figure.strength)
        self._shade(mask)
        if line:
            border = [ribbon(outline, line, closed=True) for outline in (*outlines, *holes)]
            self._blend(self.mask(border), edge_of(colour.rgb), 210)
        return mask

    def detail(self, outlines: Sequence[np.ndarray], rgb: RGB, strength: int = 256, within: Mask | None = None) -> None:
        """Blends `outlines` over the picture with opacity `strength` / 256, clipped to the mask `within`, if any."""
        mask = self.mask(outlines)
        self._blend(mask.within(within) if within else mask, rgb, strength)

    def mask(self, outlines: Sequence[np.ndarray], holes: Sequence[np.ndarray] = ()) -> Mask:
        """Returns the mask of the pixels that `outlines` cover, without `holes`."""
        points = np.concatenate([outline.reshape(-1, 2) for outline in outlines])
        lengths = [outline.shape[-2] for outline in outlines for _ in range(outline.size // (2 * outline.shape[-2]))]
        mask = coverage(self._placed(points), lengths, self.height, self.width)
        return mask.without(self.mask(holes)) if holes else mask

    def box(self) -> tuple[int, int, int, int]:
        """Returns the product's box: left, top, width and height in pixels."""
        return _box(self.covered > 0)

    def part_boxes(self) -> dict[str, tuple[tuple[int, int, int, int], PaletteColour]]:
        """Returns part name -> (box of the pixels that it owns, colour), without parts that own no pixel."""
        return {
            name: (_box(self.owner == number), colour)
            for number, (name, colour) in enumerate(self.parts)
            if (self.owner == number).any()
        }

    def cast_shadow(self, strength: int) -> None:
        """Draws a soft shadow below and to the right of the product, whose opacity is at most `strength` / 256."""
        reach = max(self.width // 40, 1)
        shadow = np.zeros_like(self.covered)
        shadow[2 * reach :, reach:] = self.covered[: -2 * reach, :-reach]
        for _ in range(2):
            shadow = _blurred(_blurred(shadow, reach).T, reach).T
        darkening = shadow * (256 - self.covered) * strength >> 16
        self.pixels -= self.pixels * darkening[:, :, None] >> 8

    def _placed(self, points: np.ndarray) -> np.ndarray:
        place = self._placement
        x, y = points[:, 0] * (-1 if place.mirrored else 1), points[:, 1]
        turned = np.stack([x * _FIELD - y * place.tilt, y * _FIELD + x * place.tilt], axis=1)
        scaled = turned * (place.size * PIXEL * self.width) // (1000 * 1000 * UNITS * FINE)
        middle = np.array([self.width * PIXEL // 2, self.height * PIXEL // 2])
        return scaled + middle + np.array([place.right, place.down]) * PIXEL * self.width // UNITS

    def _blend(self, mask: Mask, rgb: RGB, strength: int = 256) -> None:
        alpha = mask.alpha if strength == 256 else mask.alpha * strength >> 8
        under = self.pixels[mask.window]
        under += (np.array(rgb, np.int32) - under) * alpha[:, :, None] + 128 >> 8
        covered = self.covered[mask.window]
        np.maximum(covered, alpha, out=covered)

    def _shade(self, mask: Mask) -> None:
        rows, columns = mask.alpha.shape
        across = 8 - 30 * np.arange(columns) // columns
        reach = max(self.width // 40, 1)
        lit = np.zeros_like(mask.alpha)
        lit[:-reach, :-reach] = mask.alpha[reach:, reach:]
        rim = np.maximum(mask.alpha - lit, 0) * 22 >> 8
        factor = 256 + (mask.alpha * across >> 8) - rim
        under = self.pixels[mask.window]
        np.minimum(under * factor[:, :, None] >> 8, 255, out=under)


def _blurred(field: np.ndarray, reach: int) -> np.ndarray:
    """Returns the mean of each value and its neighbours up to `reach` rows above and below."""
    sums = np.cumsum(np.pad(field, [(reach + 1, reach), (0, 0)]), axis=0, dtype=np.int32)
    span = 2 * reach + 1
    return (sums[span:] - sums[:-span]) // span


def _box(seen: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1
