"""Colours under the names that product catalogues use."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxclip.catalog.drawn.chance import Chance


class RGB(NamedTuple):
    """A colour; each channel is 0 to 255."""

    red: int
    green: int
    blue: int


@dataclass(frozen=True)
class PaletteColour:
    """A colour and its name."""

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
    """Returns `rgb` made darker (percent < 100) or lighter (percent > 100), never beyond white."""
    if percent <= 100:
        return RGB(*(channel * percent // 100 for channel in rgb))
    return RGB(*(channel + (255 - channel) * min(percent - 100, 100) // 100 for channel in rgb))


def edge_of(rgb: RGB) -> RGB:
    """Returns the outline colour of a part in `rgb`: darker, or lighter if the part is nearly black."""
    return shaded(rgb, 62) if sum(rgb) > 170 else shaded(rgb, 124)


def difference(first: RGB, second: RGB) -> int:
    """Returns the L1 distance of two colours, 0 to 765."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True))


def contrasting(rgb: RGB, *preferences: RGB) -> RGB:
    """Returns the first of `preferences` whose `difference` from `rgb` is at least 200; WHITE or INK if none is."""
    for preference in preferences:
        if difference(rgb, preference) >= 200:
            return preference
    return INK if sum(rgb) > 380 else WHITE


def another(colours: tuple[PaletteColour, ...], than: PaletteColour, chance: Chance) -> PaletteColour:
    """Returns one of `colours` whose `difference` from `than` is at least 150, or any of them if there is none."""
    return chance.pick([colour for colour in colours if difference(colour.rgb, than.rgb) >= 150] or colours)


def dyed(colour: PaletteColour, chance: Chance) -> PaletteColour:
    """Returns `colour` with the same name and each channel changed by 5 levels at most, as dye lots vary."""
    return PaletteColour(
        colour.name, RGB(*(min(255, max(0, channel + chance.between(-5, 5))) for channel in colour.rgb))
    )
