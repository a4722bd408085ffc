"""Products, filters and results as the API shows them."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, Field

from jaxclip.features.palette import PROTOTYPES
from jaxclip.retrieval.gallery import Details, Facet, Gallery


def _chroma(look: str) -> int:
    return max(bytes.fromhex(look)) - min(bytes.fromhex(look))


_LOOKS = {name.casefold(): max(looks, key=_chroma) for name, looks in PROTOTYPES.items()}
"""Of each colour name the look that is least like grey: it is told apart best."""
SUGGESTIONS, SUGGESTED_SEED = 5, 0


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    detail: str


class Result(BaseModel):
    """A product in a list."""

    id: str
    score: float | None = Field(description="cosine of the picture with the query; null where nothing was asked")
    caption: str = Field(description="its name, empty where the catalogue has none")
    category: str
    image: str = Field(description="address of its picture")


class Results(BaseModel):
    """Products, best first."""

    results: list[Result]
    matching: int = Field(description="products that pass the filters")


class Colour(BaseModel):
    """A colour of a product's crop."""

    name: str
    rgb: str = Field(description="as #rrggbb")
    share: float = Field(description="of the crop's product pixels")


class Product(BaseModel):
    """All that is known of a product."""

    id: str
    caption: str
    captions: list[str]
    category: str
    attributes: dict[str, str]
    image: str
    crop: list[float] | None = Field(description="left, top, right, bottom as shares of the picture")
    colours: list[Colour]


class Value(BaseModel):
    """A value of an attribute."""

    value: str
    products: int
    swatch: str | None = Field(description="#rrggbb where it is the name of a colour")


class FacetShown(BaseModel):
    """An attribute to filter by."""

    name: str
    values: list[Value]
    colour: bool = Field(description="whether most values name colours")


class GalleryShown(BaseModel):
    """What there is to search."""

    name: str
    products: int
    facets: list[FacetShown]
    suggestions: list[str] = Field(description="sentences to begin with")
    picture_size: int = Field(description="side of the picture that the towers see, in pixels")


def address(id: str) -> str:
    """Returns where a product's picture is."""
    return f"/v1/images/{quote(id, safe='')}"


def results(gallery: Gallery, numbers: Iterable[int], scores: Iterable[float | None], matching: int) -> Results:
    """Returns products by number."""
    rows = [
        Result(
            id=gallery.ids[number],
            score=None if score is None else round(float(score), 6),
            caption=gallery.captions[number],
            category=gallery.categories[number],
            image=address(gallery.ids[number]),
        )
        for number, score in zip(numbers, scores, strict=True)
    ]
    return Results(results=rows, matching=matching)


def product(details: Details) -> Product:
    """Returns a product with its crop and colours, where preparation found them."""
    shown, features = details.product, details.features
    return Product(
        id=shown.id,
        caption=shown.captions[0] if shown.captions else "",
        captions=list(shown.captions),
        category=shown.category,
        attributes=dict(shown.attributes),
        image=address(shown.id),
        crop=features["crops"][0].tolist() if len(features.get("crops", ())) else None,
        colours=_colours(features),
    )


def gallery(shown: Gallery, picture_size: int) -> GalleryShown:
    """Returns what there is to search and to filter by."""
    facets = [_facet(facet) for facet in shown.facets()]
    captions = sorted({caption for caption in shown.captions if caption})
    chosen = np.random.default_rng(SUGGESTED_SEED).permutation(len(captions))[:SUGGESTIONS]
    return GalleryShown(
        name=shown.name,
        products=len(shown),
        facets=facets[:1] + sorted(facets[1:], key=lambda facet: not facet.colour),
        suggestions=[captions[number] for number in chosen],
        picture_size=picture_size,
    )


def _facet(facet: Facet) -> FacetShown:
    values = []
    for value, count in facet.values:
        look = _LOOKS.get(value.casefold())
        values.append(Value(value=value, products=count, swatch=f"#{look}" if look else None))
    coloured = sum(value.swatch is not None for value in values)
    return FacetShown(name=facet.name, values=values, colour=coloured > len(values) / 2)


def _colours(features: dict[str, Any]) -> list[Colour]:
    if not {"colour_names", "colour_rgb", "colour_shares"} <= features.keys():
        return []
    columns = features["colour_names"], features["colour_rgb"], features["colour_shares"]
    return [
        Colour(name=name, rgb=f"#{bytes(rgb.tolist()).hex()}", share=round(float(share), 4))
        for name, rgb, share in zip(*columns, strict=False)
        if share > 0
    ]
