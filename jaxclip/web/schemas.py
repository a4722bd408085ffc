"""Products, filters and results as the API shows them."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, Field

from jaxclip.features.palette import PROTOTYPES
from jaxclip.serving.gallery import Facet, Gallery, ProductDetails
from jaxclip.serving.reordering import SecondStage
from jaxclip.serving.searcher import Found, Searcher, reasons


def _chroma(look: str) -> int:
    return max(bytes.fromhex(look)) - min(bytes.fromhex(look))


PURE = 255
"""Chroma of a screen's primaries, which no product has."""
_LOOKS = {
    name.casefold(): max((look for look in looks if _chroma(look) < PURE), key=_chroma)
    for name, looks in PROTOTYPES.items()
}
"""Of each colour name the look that is least like grey: it is told apart best."""
SUGGESTIONS, LOOKED_AT, SUGGESTED_SEED = 5, 40, 0
"""The shortest of as many captions, which read more like what people type."""


class Problem(BaseModel):
    """What is wrong, in one sentence."""

    detail: str


class Reason(BaseModel):
    """What the second stage did with a feature of a product."""

    feature: str
    gate: float = Field(description="its weight for this query, from 0 to 2")
    added: float = Field(description="what it added to the product's score")


class Result(BaseModel):
    """A product in a list."""

    id: str
    score: float | None = Field(
        description="cosine of the picture with the query, or the second stage's score; null where nothing was asked"
    )
    caption: str = Field(description="its name, empty where the catalogue has none")
    category: str
    image: str = Field(description="address of its picture")
    before: int | None = Field(None, description="its place in the first stage, from 1; null where that is this list")
    first: float | None = Field(None, description="its score in the first stage, where it was placed anew")
    why: list[Reason] = Field([], description="why it is where it is; empty where the second stage has no gates")


class Results(BaseModel):
    """Products, best first."""

    results: list[Result]
    matching: int = Field(description="products that pass the filters")
    first_stage: list[Result] | None = Field(
        None, description="as the first stage has them, where a second one came after"
    )


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


class SecondStageShown(BaseModel):
    """A re-ranker."""

    name: str
    candidates: int = Field(description="of the first stage's products, how many it looks at")


class GalleryShown(BaseModel):
    """What there is to search."""

    name: str
    products: int
    facets: list[FacetShown]
    suggestions: list[str] = Field(description="sentences to begin with")
    picture_size: int = Field(description="side of the picture that the towers see, in pixels")
    second_stage: SecondStageShown | None = Field(description="what can order sentences' results anew")


def address(id: str) -> str:
    """Returns where a product's picture is."""
    return f"/v1/images/{quote(id, safe='')}"


def results(gallery: Gallery, numbers: Iterable[int], scores: Iterable[float | None], matching: int) -> Results:
    """Returns products by number."""
    return Results(results=_list(gallery, numbers, scores), matching=matching)


def found(gallery: Gallery, stage: SecondStage | None, found: Found, matching: int) -> Results:
    """Returns what a search found, in both orders where there are two."""
    shown = results(gallery, found.numbers.tolist(), found.scores.tolist(), matching)
    second = found.reordered
    if second is None:
        return shown
    for place, result in enumerate(shown.results):
        result.before, result.first = int(second.before[place]), round(float(second.first[place]), 6)
        result.why = [
            Reason(feature=name, gate=round(reason.gate, 4), added=round(reason.added, 6))
            for name, reason in reasons(stage, second, place).items()
        ]
    first = np.argsort(second.before)[: len(found.numbers)]
    shown.first_stage = _list(gallery, second.numbers[first].tolist(), second.first[first].tolist())
    return shown


def _list(gallery: Gallery, numbers: Iterable[int], scores: Iterable[float | None]) -> list[Result]:
    return [
        Result(
            id=gallery.ids[number],
            score=None if score is None else round(float(score), 6),
            caption=gallery.captions[number],
            category=gallery.categories[number],
            image=address(gallery.ids[number]),
        )
        for number, score in zip(numbers, scores, strict=True)
    ]


def product(details: ProductDetails) -> Product:
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


def gallery(searcher: Searcher) -> GalleryShown:
    """Returns what there is to search and to filter by."""
    shown, second = searcher.gallery, searcher.second
    facets = [_facet(facet) for facet in shown.facets()]
    captions = sorted({caption for caption in shown.captions if caption})
    drawn = np.random.default_rng(SUGGESTED_SEED).permutation(len(captions))[:LOOKED_AT]
    return GalleryShown(
        name=shown.name,
        products=len(shown),
        facets=facets[:1] + sorted(facets[1:], key=lambda facet: (not facet.colour, len(facet.values))),
        suggestions=sorted((captions[number] for number in drawn), key=len)[:SUGGESTIONS],
        picture_size=searcher.picture_size,
        second_stage=second and SecondStageShown(name=second.name, candidates=second.candidates),
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
