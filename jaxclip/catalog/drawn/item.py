"""What a drawn product is, before it is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxclip.catalog.drawn.brands import Brand
from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.palette import CLOTH, PaletteColour
from jaxclip.catalog.drawn.patterns import SOLID, Cloth


@dataclass(frozen=True)
class DrawnItem:
    """One product: all that its name says and all that its picture shows.

    Attributes:
      gender: "Men", "Women" or "Unisex".
      brand: whose emblem it bears.
      main: the colour by which the catalogue lists it.
      cloth: the pattern on its main part.
      traits: what the kind leaves open, in the words of the name ("Long Sleeve"), by trait; "" is the usual form.
      colours: the colour of parts that have their own, by role.
    """

    gender: str
    brand: Brand
    main: PaletteColour
    cloth: Cloth
    traits: Mapping[str, str]
    colours: Mapping[str, PaletteColour]

    def has(self, words: str) -> bool:
        """Whether `words` are among the traits' words."""
        return any(words in trait for trait in self.traits.values())


@dataclass(frozen=True)
class Kind:
    """A kind of product: its columns in the catalogue, what varies, and how it is drawn.

    Attributes:
      columns: masterCategory, subCategory and articleType.
      name: the product's name after brand and gender; {cloth} stands for colour and pattern, {ROLE} for the colour of
        a role, {TRAIT} for the words of a trait, which may name roles themselves.
      draw: puts a product of this kind on a canvas.
      traits: the words a trait can take.
      colours: the palette of the main colour.
      roles: the palette of each part that has its own colour.
      patterns: what its cloth can bear besides being plain.
      genders: for whom it is made.
      usage: what it can be used for.
      mirrors: whether it may face either way.
      size: how large it is photographed, in percent.
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
    """The product's name, such as "Kestrane Men Brown Leather Strap Green Dial Watch"."""
    cloth = item.main.name
    if item.cloth.pattern != SOLID:
        cloth = f"{cloth} & {item.cloth.second.name} {item.cloth.pattern}"
    colours = {role: colour.name for role, colour in item.colours.items()}
    words = kind.name.format(cloth=cloth, **item.traits, **colours).format(**colours)
    return " ".join(f"{item.brand.name} {item.gender} {words}".split())
