"""Fictitious brands and their emblems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.outlines import ellipse, mirrored, placed, rectangle, ribbon, rounded, symmetric
from jaxclip.catalog.drawn.palette import CLOTH, INK, RGB, WHITE, PaletteColour, contrasting, difference

_COLOURS = {colour.name: colour for colour in CLOTH}


@dataclass(frozen=True)
class Brand:
    """A brand and its emblem.

    Attributes:
      name: the first word of the names of its products.
      emblem: outlines around the origin, about 100 units in each direction.
      colour: the emblem's preferred colour; white or black is used if it would not stand out against the product.
      holes: outlines cut out of the emblem.
    """

    name: str
    emblem: Sequence[np.ndarray]
    colour: PaletteColour
    holes: Sequence[np.ndarray] = ()

    def sign(self, canvas: Canvas, x: int, y: int, ground: RGB, radius: int, part: str = "emblem") -> None:
        """Draws the emblem around (x, y), about `radius` units in each direction, and records it as `part`.

        Its colour stands out against `ground`, and a border makes it stand out on patterns.
        """
        preferences = (self.colour, _COLOURS["White"], _COLOURS["Black"])
        colour = next(preference for preference in preferences if difference(preference.rgb, ground) >= 200)
        emblem = [placed(outline, x, y, radius) for outline in self.emblem]
        holes = [placed(outline, x, y, radius) for outline in self.holes]
        halo = contrasting(colour.rgb, ground, WHITE, INK)
        canvas.detail([*emblem, *(ribbon(outline, 26, closed=True) for outline in emblem)], halo)
        canvas.part(part, emblem, colour, holes=holes, line=0)


_RAY = [(0, -100), (26, -36), (95, -31), (42, 14), (59, 81)]
_STAR = [symmetric([*_RAY, (0, 44)], 8)]
_HEART = [symmetric([(0, -46, 0), (28, -92, 60), (96, -88, 90), (104, -10, 90), (0, 98, 14)])]
_CRESCENT = [
    rounded([(30, -96, 10), (-40, -98, 90), (-104, -60, 90), (-104, 60, 90), (-40, 98, 90), (30, 96, 10)]
            + [(-10, 70, 60), (-50, 40, 60), (-50, -40, 60), (-10, -70, 60)])
]  # fmt: skip
_BOLT = [rounded([(20, -100), (-62, 12), (-8, 12), (-28, 100), (66, -24), (10, -24), (50, -100)], 4)]
_LEAF = [rounded([(-86, 86, 0), (-92, -50, 120), (86, -86, 0), (50, 92, 120)], 100)]
_DROP = [symmetric([(0, -104, 4), (48, -20, 70), (76, 40, 60), (66, 98, 60), (0, 98, 60)])]
_PLUS = [rectangle(-34, -94, 34, 94, 8), rectangle(-94, -34, 94, 34, 8)]
_PEAKS = [rounded([(-104, 76), (-34, -70), (8, 8), (36, -34), (104, 76)], 8)]
_WINGS = [rounded([(0, 70), (0, 12), (96, -84), (88, -6)], 10)]

BRANDS = (
    Brand("Aurelis", _STAR, _COLOURS["Yellow"]),
    Brand("Belmora", _HEART, _COLOURS["Red"]),
    Brand("Corvane", _CRESCENT, _COLOURS["White"]),
    Brand("Dunmark", [rectangle(-80, -80, 80, 80, 8)], _COLOURS["Black"], [rectangle(-36, -36, 36, 36, 4)]),
    Brand("Fjellby", _PEAKS, _COLOURS["Turquoise Blue"]),
    Brand("Halvern", _PLUS, _COLOURS["Red"]),
    Brand("Juniq", [ellipse(0, 0, 96, 96)], _COLOURS["Orange"], [ellipse(0, 0, 48, 48)]),
    Brand("Kestrane", _BOLT, _COLOURS["Yellow"]),
    Brand("Marenza", _DROP, _COLOURS["Blue"]),
    Brand("Nordvik", [rounded([(0, -104), (74, 0), (0, 104), (-74, 0)], 4)], _COLOURS["White"]),
    Brand("Skylark", [*_WINGS, *map(mirrored, _WINGS)], _COLOURS["Purple"]),
    Brand("Verdelle", _LEAF, _COLOURS["Green"]),
)
