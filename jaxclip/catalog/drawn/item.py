"""Descriptions of drawn products, from which their names and pictures are made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxclip.catalog.drawn.brands import Brand
from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.palette import CLOTH, PaletteColour
from jaxclip.catalog.drawn.patterns import SOLID, Cloth


@dataclass(frozen=True)
class DrawnItem:
    """One product as its name and its picture show it, without background and position.

    Attributes:
      gender: "Men", "Women" or "Unisex".
      brand: the brand whose emblem it carries.
      main: the colour by which the catalogue lists it.
      cloth: the pattern on its main part.
      traits: trait -> its words in the name, such as "Long Sleeve"; "" for the usual form.
      colours: role -> colour, for parts that can have another colour than `main`.
    """

    gender: str
    brand: Brand
    main: PaletteColour
    cloth: Cloth
    traits: Mapping[str, str]
    colours: Mapping[str, PaletteColour]

    def has(self, words: str) -> bool:
        """Returns whether `words` is part of the words of any trait."""
        return any(words in trait for trait in self.traits.values())


@dataclass(frozen=True)
class Kind:
    """A kind of product: its columns in the catalogue, its variations, and how it is drawn.

    Attributes:
      columns: masterCategory, subCategory and articleType.
      name: the product's name after brand and gender; {cloth} stands for colour and pattern, {ROLE} for the colour of
        a role, {TRAIT} for the words of a trait, which may name roles themselves.
      draw: draws a product of this kind on a canvas.
      traits: trait -> the words it can have in the name.
      colours: the palette of the main colour.
      roles: role -> the palette of a part that can have another colour than the main one.
      patterns: the patterns that its cloth may have besides plain.
      genders: the genders it is made for.
      usage: the values that its column `usage` can have; a repeated value is more likely.
      mirrors: whether its pictures may be mirrored, so that it faces either way.
      size: how large it is photographed, in percent of the usual size.
    """

    columns: tuple[str, str, str]
    name: str
    draw: Callable[[Canvas, DrawnItem], None]
    traits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    colours: tuple[PaletteColour, ...] = CLOTH
    roles: Mapping[str, tuple[PaletteColour, ...]] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    genders: tuple[str, ...] = ("Men", "Women")
    usage: tuple[str, ...] = ("Casual",)
    mirrors: bool = False
    size: int = 100


def name_of(item: DrawnItem, kind: Kind) -> str:
    """Returns the product's name, such as "Kestrane Men Brown Leather Strap Green Dial Watch"."""
    cloth = item.main.name
    if item.cloth.pattern != SOLID:
        cloth = f"{cloth} & {item.cloth.second.name} {item.cloth.pattern}"
    colours = {role: colour.name for role, colour in item.colours.items()}
    words = kind.name.format(cloth=cloth, **item.traits, **colours).format(**colours)
    return " ".join(f"{item.brand.name} {item.gender} {words}".split())
