"""Makes a drawn product from a seed and its index: its row in styles.csv, its picture, and the ground truth."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxclip.catalog.drawn.backgrounds import choose_background, paint_background
from jaxclip.catalog.drawn.brands import BRANDS
from jaxclip.catalog.drawn.canvas import Canvas, Placement
from jaxclip.catalog.drawn.chance import Chance
from jaxclip.catalog.drawn.item import DrawnItem, Kind, name_of
from jaxclip.catalog.drawn.kinds import KINDS
from jaxclip.catalog.drawn.palette import CLOTH, another, dyed
from jaxclip.catalog.drawn.patterns import SOLID, Cloth

WIDTH, HEIGHT = 120, 160
_FIRST_ID = 10_001
_SEASONS = ("Summer", "Fall", "Winter", "Spring")


@dataclass(frozen=True)
class Drawing:
    """One drawn product of the catalogue.

    Attributes:
      row: column -> value of its row in styles.csv.
      canvas: its picture.
      empty: the same background without the product and its shadow.
      truth: its entry in truth.json.
    """

    row: dict[str, str]
    canvas: Canvas
    empty: np.ndarray
    truth: dict[str, Any]


def product_row(seed: int, index: int) -> dict[str, str]:
    """Returns the row in styles.csv of product `index`, counted from 0, of the catalogue of `seed`, by column."""
    kind = _kind(seed, index)
    item = _item(kind, Chance(seed, index, "item"))
    chance = Chance(seed, index, "row")
    master, sub, article = kind.columns
    return {
        "id": str(_FIRST_ID + index),
        "gender": item.gender,
        "masterCategory": master,
        "subCategory": sub,
        "articleType": article,
        "baseColour": item.main.name,
        "season": chance.pick(_SEASONS),
        "year": str(chance.between(2011, 2018)),
        "usage": chance.pick(kind.usage),
        "productDisplayName": name_of(item, kind),
    }


def draw_product(seed: int, index: int) -> Drawing:
    """Returns product `index`, from 0, of the catalogue of `seed`; it does not depend on the catalogue's size."""
    kind = _kind(seed, index)
    item = _item(kind, Chance(seed, index, "item"))
    chance = Chance(seed, index, "photo")
    background = choose_background(chance)
    empty = paint_background(background, chance, HEIGHT, WIDTH)
    canvas = Canvas(empty, _placement(kind, chance))
    kind.draw(canvas, item)
    truth = {
        "box": canvas.box(),
        "parts": {
            name: {"box": box, "colour": colour.name, "rgb": colour.rgb}
            for name, (box, colour) in canvas.part_boxes().items()
        },
        "pattern": item.cloth.pattern,
        "pattern_colour": None if item.cloth.pattern == SOLID else item.cloth.second.name,
        "background": background,
    }
    canvas.cast_shadow(chance.between(50, 110))
    return Drawing(product_row(seed, index), canvas, empty, truth)


def _kind(seed: int, index: int) -> Kind:
    # Each block of len(KINDS) products holds every kind once, so that all kinds are about equally frequent.
    block, position = divmod(index, len(KINDS))
    return Chance(seed, block, "kinds").shuffled(KINDS)[position]


def _item(kind: Kind, chance: Chance) -> DrawnItem:
    main = dyed(chance.pick(kind.colours), chance)
    pattern = chance.pick(kind.patterns) if kind.patterns and chance.happens(45) else SOLID
    return DrawnItem(
        gender=chance.pick(kind.genders),
        brand=chance.pick(BRANDS),
        main=main,
        cloth=Cloth(pattern, dyed(another(CLOTH, main, chance), chance), chance.between(85, 125)),
        traits={trait: chance.pick(words) for trait, words in kind.traits.items()},
        colours={role: dyed(another(palette, main, chance), chance) for role, palette in kind.roles.items()},
    )


def _placement(kind: Kind, chance: Chance) -> Placement:
    size = chance.between(760, 980)
    room = (1000 - size) * 6 // 10
    return Placement(
        size=size * kind.size // 100,
        tilt=chance.between(-45, 45),
        right=chance.between(-room, room),
        down=chance.between(-room, room),
        mirrored=kind.mirrors and chance.happens(50),
    )
