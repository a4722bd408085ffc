"""Colours, under the names by which product catalogues call them."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxclip.catalog.drawn.chance import Chance


class RGB(NamedTuple):
    """A colour, 0 to 255 each."""

    red: int
    green: int
    blue: int


@dataclass(frozen=True)
class PaletteColour:
    """A colour and the word for it."""

    name: str
    rgb: RGB


def _colours(**named: tuple[int, int, int]) -> tuple[PaletteColour, ...]:
    return tuple(PaletteColour(name.replace("_", " "), RGB(*rgb)) for name, rgb in named.items())


CLOTH = _colours(
    Black=(42, 42, 48),
    White=(247, 246, 243),
    Grey=(150, 152, 156),
    Navy_Blue=(36, 50, 98),
    Blue=(56, 116, 204),
    Turquoise_Blue=(64, 188, 196),
    Green=(56, 148, 84),
    Olive=(124, 126, 62),
    Yellow=(246, 206, 72),
    Orange=(240, 138, 52),
    Red=(212, 50, 54),
    Maroon=(122, 30, 52),
    Pink=(244, 150, 176),
    Purple=(126, 78, 164),
    Brown=(128, 84, 54),
    Beige=(224, 204, 170),
)
DENIM = tuple(colour for colour in CLOTH if colour.name in ("Black", "White", "Grey", "Navy Blue", "Blue", "Beige"))
TRIM = tuple(colour for colour in CLOTH if colour.name in ("Black", "White", "Brown", "Beige", "Red", "Navy Blue"))
METAL = _colours(Gold=(222, 180, 84), Silver=(196, 200, 206))

WHITE = RGB(252, 252, 250)
INK = RGB(44, 44, 50)


def shaded(rgb: RGB, percent: int) -> RGB:
    """`rgb` made darker (percent < 100) or lighter (percent > 100), never beyond white."""
    if percent <= 100:
        return RGB(*(channel * percent // 100 for channel in rgb))
    return RGB(*(channel + (255 - channel) * min(percent - 100, 100) // 100 for channel in rgb))


def edge_of(rgb: RGB) -> RGB:
    """The colour of the line around a part in `rgb`: darker, but lighter on what is nearly black."""
    return shaded(rgb, 62) if sum(rgb) > 170 else shaded(rgb, 124)


def difference(first: RGB, second: RGB) -> int:
    """How far apart two colours are, 0 to 765."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def contrasting(rgb: RGB, *wishes: RGB) -> RGB:
    """The first of `wishes` that stands out against `rgb`; white or ink where none does."""
    for wish in wishes:
        if difference(rgb, wish) >= 200:
            return wish
    return INK if sum(rgb) > 380 else WHITE


def another(colours: tuple[PaletteColour, ...], than: PaletteColour, chance: Chance) -> PaletteColour:
    """One of `colours` that nobody would take for `than`; any of them where all are near."""
    return chance.pick([colour for colour in colours if difference(colour.rgb, than.rgb) >= 150] or colours)


def dyed(colour: PaletteColour, chance: Chance) -> PaletteColour:
    """`colour` as one dye bath gives it: the same name, each channel off by a few levels at most."""
    return PaletteColour(
        colour.name, RGB(*(min(255, max(0, channel + chance.between(-5, 5))) for channel in colour.rgb))
    )
