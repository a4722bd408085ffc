"""The results of a search, and their display in notebooks."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxclip.catalog.pictures import mime
from jaxclip.serving.gallery import ProductDetails


class Reason(NamedTuple):
    """The effect of one feature in the second stage.

    Attributes:
      gate: weight of the feature for the query, from 0 to 2.
      added: contribution of the feature to the product's score.
    """

    gate: float
    added: float


@dataclass(frozen=True, eq=False)
class Row:
    """A product in the results of a search; a notebook shows its picture.

    Attributes:
      id: id of the product.
      score: the second stage's score if the product was one of its candidates, else the highest cosine of its pictures
        with the query.
      place: place among the results, from 1.
      before: place in the first stage, from 1; None if no second stage ordered the results.
      why: feature -> its effect in the second stage; empty if the second stage reports no effects for the product.
      details: everything stored about the product.
      image_bytes: the encoded main picture, JPEG or PNG.
    """

    id: str
    score: float
    place: int
    before: int | None
    why: Mapping[str, Reason] = field(repr=False)
    details: ProductDetails = field(repr=False)
    image_bytes: bytes = field(repr=False)

    @property
    def caption(self) -> str:
        """First caption of the product; "" if it has none."""
        return self.details.product.captions[0] if self.details.product.captions else ""

    @property
    def category(self) -> str:
        return self.details.product.category

    @property
    def attributes(self) -> Mapping[str, str]:
        return self.details.product.attributes

    @property
    def mime(self) -> str:
        return mime(self.image_bytes)

    def _repr_html_(self) -> str:
        source = f"data:{self.mime};base64,{base64.b64encode(self.image_bytes).decode()}"
        name = html.escape(self.caption or self.id)
        score = f"{self.score:.3f}{format_move(self.place, self.before)}"
        return (
            '<figure style="display:inline-block;width:9em;margin:.4em;vertical-align:top;text-align:center">'
            f'<img src="{source}" alt="{name}" style="max-width:100%;height:9em;object-fit:contain">'
            f'<figcaption style="font-size:.85em;line-height:1.3">{name}<br><small>{score}</small>'
            "</figcaption></figure>"
        )


class Results(Sequence):
    """The rows of a search, best first; a notebook shows their pictures."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return Results(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        scores = (f"{row.score:.3f}{format_move(row.place, row.before)}" for row in self)
        lines = (f"{score}  {row.id}  {row.caption}".rstrip() for score, row in zip(scores, self, strict=True))
        return "\n".join(lines) or "nothing found"

    def _repr_html_(self) -> str:
        return "".join(row._repr_html_() for row in self) or "nothing found"


def format_move(place: int, before: int | None) -> str:
    """Returns how many places the second stage moved a product up or down, such as " ▲3"; "" if it did not move."""
    if before is None or before == place:
        return ""
    return f" {'▲' if before > place else '▼'}{abs(before - place)}"
