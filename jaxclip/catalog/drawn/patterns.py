"""Patterns that are woven into or printed on cloth."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxclip.catalog.drawn.outlines import FINE, ellipse, placed, rectangle, repeated, ribbon, rounded
from jaxclip.catalog.drawn.palette import RGB, PaletteColour, shaded

SOLID = "Solid"
PATTERNS = ("Striped", "Vertical Striped", "Checked", "Polka Dot", "Floral", "Zigzag", "Colourblock", "Camouflage")

_DOT = ellipse(0, 0, 26, 26)
_PETALS = [placed(ellipse(0, 0, 19, 19), x, y) for x, y in ((0, -26), (25, -8), (15, 21), (-15, 21), (-25, -8))]
_BLOBS = [
    rounded([(-90, -30), (-20, -60), (60, -40), (110, 10), (40, 30), (-10, 60), (-70, 30)], 60),
    rounded([(-60, -60), (10, -30), (70, -50), (80, 30), (10, 70), (-30, 20), (-90, 30)], 60),
]


@dataclass(frozen=True)
class Figure:
    """Outlines of one colour, blended over a cloth with opacity `strength` / 256."""

    outlines: list[np.ndarray]
    rgb: RGB
    strength: int = 256


@dataclass(frozen=True)
class Cloth:
    """A pattern in a second colour, drawn over the part's own colour.

    Attributes:
      pattern: SOLID, which has no figures, or one of PATTERNS.
      second: the pattern's own colour.
      size: the pattern's size in percent.
    """

    pattern: str
    second: PaletteColour
    size: int = 100

    def figures(self, box: tuple[int, int, int, int]) -> Iterator[Figure]:
        """Yields the pattern's figures for a part in `box` (left, top, right, bottom); they may reach beyond it."""
        rgb = self.second.rgb
        match self.pattern:
            case "Striped":
                yield Figure(self._stripes(box, 110, 42, down=True), rgb)
            case "Vertical Striped":
                yield Figure(self._stripes(box, 90, 28, down=False), rgb)
            case "Checked":
                yield Figure(self._stripes(box, 140, 58, down=True), rgb, 150)
                yield Figure(self._stripes(box, 140, 58, down=False), rgb, 150)
            case "Polka Dot":
                yield Figure([repeated(placed(_DOT, 0, 0, self.size), self._lattice(box, 110))], rgb)
            case "Floral":
                spots = self._lattice(box, 160)
                petals = [placed(petal, 0, 0, self.size) for petal in _PETALS]
                yield Figure([repeated(petal, spots) for petal in petals], rgb)
                yield Figure([repeated(placed(_DOT, 0, 0, self.size // 2), spots)], shaded(rgb, 60))
            case "Zigzag":
                yield Figure(self._zigzags(box), rgb)
            case "Camouflage":
                spots = self._lattice(box, 190)
                yield Figure(
                    [repeated(placed(blob, 0, 0, self.size), spots[n::2]) for n, blob in enumerate(_BLOBS)], rgb, 230
                )
            case "Colourblock":
                left, top, right, bottom = box
                yield Figure([rectangle(left, top + (bottom - top) * 3 // 5, right, bottom)], rgb)

    def _stripes(self, box: tuple[int, int, int, int], period: int, width: int, down: bool) -> list[np.ndarray]:
        left, top, right, bottom = box
        period, width = period * self.size // 100, width * self.size // 100
        if down:
            starts = [(0, y) for y in range(_multiple(top, period), bottom, period)]
            return [repeated(rectangle(left, 0, right, width), starts)]
        starts = [(x, 0) for x in range(_multiple(left - width // 2, period), right, period)]
        return [repeated(rectangle(-width // 2, top, width - width // 2, bottom), starts)]

    def _lattice(self, box: tuple[int, int, int, int], period: int) -> list[tuple[int, int]]:
        left, top, right, bottom = box
        period = period * self.size // 100
        return [
            (x + row % 2 * period // 2, row * period * 3 // 5)
            for row in range(top * 5 // (period * 3) - 1, bottom * 5 // (period * 3) + 2)
            for x in range(_multiple(left, period) - period, right + period, period)
        ]

    def _zigzags(self, box: tuple[int, int, int, int]) -> list[np.ndarray]:
        left, top, right, bottom = box
        step, period, width = (number * self.size // 100 for number in (70, 120, 40))
        columns = range(left // step - 1, right // step + 2)
        line = np.array([(column * step, column % 2 * step) for column in columns], np.int64) * FINE
        starts = [(0, y) for y in range(_multiple(top, period) - period, bottom, period)]
        return [repeated(ribbon(line, width), starts)]


def _multiple(number: int, of: int) -> int:
    return number // of * of
