"""JSON schemas of the API: products, filters and results."""

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, Field

from jaxclip.catalog.describe import described_pictures
from jaxclip.features.palette import PROTOTYPES
from jaxclip.features.rerank import FEATURES
from jaxclip.serving.gallery import Facet, Gallery, ProductDetails
from jaxclip.serving.reordering import SecondStage
from jaxclip.serving.searcher import QueryResult, Searcher, reasons


def _chroma(rgb: str) -> int:
    return max(bytes.fromhex(rgb)) - min(bytes.fromhex(rgb))


PURE = 255
"""Chroma of pure screen colours, which products do not have."""
_SWATCHES = {
    name.casefold(): max((rgb for rgb in prototypes if _chroma(rgb) < PURE), key=_chroma)
    for name, prototypes in PROTOTYPES.items()
}
"""Colour name -> hex of its most colourful prototype below PURE, the easiest to tell apart from other swatches."""
SUGGESTIONS, SAMPLED_CAPTIONS, SUGGESTION_SEED = 5, 40, 0
"""Suggestions are the shortest of some sampled captions, because people type short queries."""


class Problem(BaseModel):
    """An error, as one sentence."""

    detail: str


class ReasonSchema(BaseModel):
    """The effect of one feature in the second stage."""

    feature: str = Field(description="name in the re-ranker's `rerank.features`")
    title: str = Field(description="the feature's name for visitors")
    meaning: str = Field(description="one sentence about the feature for visitors")
    gate: float = Field(description="weight of the feature for this query, from 0 to 2")
    added: float = Field(description="the amount that the feature added to the product's score")


class Result(BaseModel):
    """A product in a list."""

    id: str
    score: float | None = Field(
        description="cosine of the picture with the query, or the second stage's score; null if there was no query"
    )
    caption: str = Field(description="name of the product; empty if it has none")
    category: str
    image: str = Field(description="URL path of the picture")
    before: int | None = Field(
        None, description="rank in the first stage, from 1; null in lists that no second stage re-ordered"
    )
    first: float | None = Field(
        None, description="score in the first stage; null in lists that no second stage re-ordered"
    )
    why: list[ReasonSchema] = Field(
        [], description="effect of each feature; empty without gates or if the second stage did not score the product"
    )


class ResultsSchema(BaseModel):
    """Products, best first; without a query, in the catalogue's order."""

    results: list[Result]
    matching: int = Field(description="number of all products that pass the filters")
    first_stage: list[Result] | None = Field(
        None, description="the first stage's results in its order; null if no second stage re-ordered them"
    )


class ColourSchema(BaseModel):
    """A colour of a product's crop."""

    name: str
    rgb: str = Field(description="as #rrggbb")
    share: float = Field(description="share of the crop's product pixels")


class CropSchema(BaseModel):
    """A part of one of a product's pictures."""

    picture: int = Field(description="number of the picture; the main picture is 0")
    box: list[float] = Field(description="left, top, right, bottom as shares of the picture")
    label: str = Field(description="what the detector calls it; empty if it found nothing")
    colours: list[ColourSchema]


class ProductSchema(BaseModel):
    """The details of a product."""

    id: str
    caption: str
    captions: list[str]
    category: str
    attributes: dict[str, str]
    image: str = Field(description="URL path of the main picture")
    images: list[str] = Field(description="URL paths of all pictures, the main picture first")
    crop: list[float] | None = Field(
        description="the first crop of the main picture: left, top, right, bottom as shares; null if there is none"
    )
    colours: list[ColourSchema] = Field(description="colours of that crop")
    crops: list[CropSchema] = Field(description="all crops, picture by picture, best first")


class Value(BaseModel):
    """A value of an attribute."""

    value: str
    products: int
    swatch: str | None = Field(description="#rrggbb if the value names a colour, else null")


class FacetSchema(BaseModel):
    """An attribute to filter by."""

    name: str
    values: list[Value]
    colour: bool = Field(description="whether most values name colours")


class SecondStageSchema(BaseModel):
    """The re-ranker."""

    name: str
    candidates: int = Field(description="number of first-stage results that it re-orders")


class GallerySchema(BaseModel):
    """The gallery and its filters."""

    name: str
    products: int
    facets: list[FacetSchema]
    suggestions: list[str] = Field(description="sentences to start with")
    picture_size: int = Field(description="side of the image tower's input, in pixels")
    second_stage: SecondStageSchema | None = Field(
        description="the re-ranker, which can re-order the results of a sentence; null if there is none"
    )


def image_path(id: str, number: int = 0) -> str:
    """Returns the URL path of one of a product's pictures, by its number from 0; the main picture is 0."""
    return f"/v1/images/{quote(id, safe='')}" + (f"?number={number}" if number else "")


def results(gallery: Gallery, numbers: Iterable[int], scores: Iterable[float | None], matching: int) -> ResultsSchema:
    """Returns the products at the gallery indices `numbers`, with these scores, in the given order."""
    return ResultsSchema(results=_list(gallery, numbers, scores), matching=matching)


def search_results(gallery: Gallery, stage: SecondStage | None, result: QueryResult, matching: int) -> ResultsSchema:
    """Returns the results of a search, and the first stage's results if a second stage re-ordered them."""
    answer = results(gallery, result.numbers.tolist(), result.scores.tolist(), matching)
    second = result.reordered
    if second is None:
        return answer
    for place, product in enumerate(answer.results):
        product.before, product.first = int(second.before[place]), round(float(second.first[place]), 6)
        product.why = [
            ReasonSchema(
                feature=name,
                title=FEATURES[name].title,
                meaning=FEATURES[name].meaning,
                gate=round(reason.gate, 4),
                added=round(reason.added, 6),
            )
            for name, reason in reasons(stage, second, place).items()
        ]
    first = np.argsort(second.before)[: len(result.numbers)]
    answer.first_stage = _list(gallery, second.numbers[first].tolist(), second.first[first].tolist())
    return answer


def _list(gallery: Gallery, numbers: Iterable[int], scores: Iterable[float | None]) -> list[Result]:
    return [
        Result(
            id=gallery.ids[number],
            score=None if score is None else round(float(score), 6),
            caption=gallery.captions[number],
            category=gallery.categories[number],
            image=image_path(gallery.ids[number]),
        )
        for number, score in zip(numbers, scores, strict=True)
    ]


def product(details: ProductDetails) -> ProductSchema:
    """Returns the details of a product, with its crop and colours if preparation measured them."""
    shown, crops = details.product, _crops(details.features)
    return ProductSchema(
        id=shown.id,
        caption=shown.captions[0] if shown.captions else "",
        captions=list(shown.captions),
        category=shown.category,
        attributes=dict(shown.attributes),
        image=image_path(shown.id),
        images=[image_path(shown.id, number) for number in range(len(shown.pictures))],
        crop=crops[0].box if crops else None,
        colours=crops[0].colours if crops else [],
        crops=crops,
    )


def gallery(searcher: Searcher) -> GallerySchema:
    """Returns the description of a searcher's gallery."""
    shown, second = searcher.gallery, searcher.second
    facets = [_facet(facet) for facet in shown.facets()]
    captions = sorted({caption for caption in shown.captions if caption})
    sample = np.random.default_rng(SUGGESTION_SEED).permutation(len(captions))[:SAMPLED_CAPTIONS]
    return GallerySchema(
        name=shown.name,
        products=len(shown),
        facets=facets[:1] + sorted(facets[1:], key=lambda facet: (not facet.colour, len(facet.values))),
        suggestions=sorted((captions[number] for number in sample), key=len)[:SUGGESTIONS],
        picture_size=searcher.picture_size,
        second_stage=second and SecondStageSchema(name=second.name, candidates=second.candidates),
    )


def _facet(facet: Facet) -> FacetSchema:
    values = []
    for value, count in facet.values:
        rgb = _SWATCHES.get(value.casefold())
        values.append(Value(value=value, products=count, swatch=f"#{rgb}" if rgb else None))
    coloured = sum(value.swatch is not None for value in values)
    return FacetSchema(name=facet.name, values=values, colour=coloured > len(values) / 2)


def _crops(features: Mapping[str, Any]) -> list[CropSchema]:
    return [
        CropSchema(
            picture=number,
            box=crop.box.tolist(),
            label=crop.label,
            colours=[
                ColourSchema(name=name, rgb=f"#{bytes(rgb.tolist()).hex()}", share=round(share, 4))
                for name, rgb, share in crop.colours
                if share > 0
            ],
        )
        for number, picture in enumerate(described_pictures(features) if "crops" in features else [])
        for crop in picture.crops
    ]
