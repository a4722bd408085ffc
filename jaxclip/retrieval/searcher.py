"""Search: sentences, pictures or products in, the nearest products of a gallery out."""

import base64
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxclip.errors import UserError
from jaxclip.retrieval.embed import padded_blocks
from jaxclip.retrieval.gallery import Details, Filters, Gallery
from jaxclip.retrieval.index import NearestNeighbours

MOST = 100
"""Products that one search returns at most."""
BATCHES = (1, 4, 8, 16, 32, 64)
"""Numbers of queries that are compiled; others are filled up to the next of them."""
PICTURE_BATCHES = (1, 4)
"""Those of pictures: a picture costs so much more than a sentence that larger batches gain nothing."""


@dataclass(frozen=True)
class QueryEncoders:
    """What turns queries into unit vectors, for any number of rows but compiled for each; and pictures into rows.

    Attributes:
      text: sentences -> (n, D).
      image: (n, S, S, 3) uint8 -> (n, D).
      picture: encoded bytes, or whatever else may stand for a picture -> (S, S, 3) uint8; UserError where it is none.
      picture_size: S.
    """

    text: Callable[[Sequence[str]], Float[np.ndarray, "n D"]]
    image: Callable[[UInt8[np.ndarray, "n S S 3"]], Float[np.ndarray, "n D"]]
    picture: Callable[[Any], UInt8[np.ndarray, "S S 3"]]
    picture_size: int


@dataclass(frozen=True, eq=False)
class Query:
    """What is searched for; of several kinds the vectors are averaged.

    Attributes:
      text: a sentence, "" for none.
      picture: (S, S, 3) uint8.
      like: number of a product, which is then not among its own neighbours.
      filters: what the products have to be.
      k: how many are wanted, at most MOST.
    """

    text: str = ""
    picture: UInt8[np.ndarray, "S S 3"] | None = None
    like: int | None = None
    filters: Filters = field(default_factory=dict)
    k: int = 10


class Found(NamedTuple):
    """Numbers of products, best first, and their scores: cosines of their pictures with the query."""

    numbers: np.ndarray
    scores: np.ndarray


class Searcher:
    """A workdir's towers over an embedded gallery, as `jaxclip.load` returns it.

    Attributes:
      gallery: the products.
      picture_size: side of the pictures that the image tower sees, pixels.
    """

    def __init__(self, gallery: Gallery, neighbours: NearestNeighbours, encoders: QueryEncoders):
        self.gallery, self._neighbours, self._encoders = gallery, neighbours, encoders
        self.picture_size = encoders.picture_size

    def search(
        self, text: str = "", *, image: Any = None, like: str | None = None, k: int = 10, filters: Filters | None = None
    ) -> "Results":
        """Returns the k products nearest to a sentence, a picture, a product, or any of them together.

        Args:
          text: a sentence.
          image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
          like: the id of a product of the gallery.
          k: from 1 to 100.
          filters: attribute -> the value or values it may have, as {"gender": "Women"}.

        Raises:
          UserError: nothing is asked for, or for something the gallery does not have.
        """
        if not 1 <= k <= MOST:
            raise UserError(f"k = {k} must be from 1 to {MOST}")
        number = None if like is None else self.gallery.number(like)
        if like is not None and number is None:
            raise UserError(f"like: the gallery has no product {like!r}")
        wanted = {name: [v] if isinstance(v, str) else list(v) for name, v in (filters or {}).items()}
        picture = None if image is None else self._encoders.picture(image)
        (found,) = self.find([Query(text, picture, number, wanted, k)])
        return Results([self._row(int(n), float(score)) for n, score in zip(*found, strict=True)])

    def encode_text(self, text: str | Sequence[str]) -> np.ndarray:
        """Returns the unit vector of a sentence, (D,), or those of a list of them, (n, D)."""
        vectors = _blocks([text] if isinstance(text, str) else list(text), self._encoders.text, BATCHES)
        return vectors[0] if isinstance(text, str) else vectors

    def encode_image(self, image: Any) -> np.ndarray:
        """Returns the unit vector of a picture, (D,), or those of a list of them, (n, D); see `search` for pictures."""
        vectors = self._encode_pictures(
            [self._encoders.picture(i) for i in (image if isinstance(image, list) else [image])]
        )
        return vectors if isinstance(image, list) else vectors[0]

    def read_picture(self, image: Any) -> UInt8[np.ndarray, "S S 3"]:
        """Returns a picture as a `Query` takes it; UserError where it is none."""
        return self._encoders.picture(image)

    def find(self, queries: Sequence[Query]) -> list[Found]:
        """Returns what is nearest to each query: the first stage, exact.

        Raises:
          UserError: a query asks for nothing, or filters by what the gallery does not have.
        """
        vectors = self.vectors(queries)
        found: list[Found | None] = [None] * len(queries)
        for filters, rows in _by_filters(queries).items():
            allowed = self.gallery.allowed(dict(filters))
            scores, numbers = self._neighbours_of(vectors[rows], allowed)
            for row, own_scores, own_numbers in zip(rows, scores, numbers, strict=True):
                kept = own_numbers != (-1 if queries[row].like is None else queries[row].like)
                found[row] = Found(own_numbers[kept][: queries[row].k], own_scores[kept][: queries[row].k])
        return found

    def vectors(self, queries: Sequence[Query]) -> Float[np.ndarray, "n D"]:
        """Returns the unit vectors of queries; UserError where one asks for nothing."""
        total = np.zeros((len(queries), self._neighbours.dimension), np.float32)
        if rows := [row for row, query in enumerate(queries) if query.text.strip()]:
            total[rows] += self.encode_text([queries[row].text for row in rows])
        if rows := [row for row, query in enumerate(queries) if query.picture is not None]:
            total[rows] += self._encode_pictures([queries[row].picture for row in rows])
        for row, query in enumerate(queries):
            if query.like is not None:
                total[row] += self._neighbours.vector(query.like)
            elif not query.text.strip() and query.picture is None:
                raise UserError("nothing is searched for: give a sentence, a picture or a product")
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)

    def warm_up(self) -> None:
        """Compiles all that searches need, so that the first ones do not wait for it."""
        picture = self._encoders.picture(self.gallery.picture(0))
        for size in PICTURE_BATCHES:
            self._encode_pictures([picture] * size)
        for size in BATCHES:
            self.find([Query(text="warm", like=0)] * size)

    def _encode_pictures(self, pictures: list) -> np.ndarray:
        return _blocks(pictures, lambda rows: self._encoders.image(np.stack(rows)), PICTURE_BATCHES)

    def _neighbours_of(self, vectors: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        found = [self._neighbours(block, allowed) for block in padded_blocks(vectors, _batch(len(vectors), BATCHES))]
        scores, numbers = (np.concatenate(parts)[: len(vectors)] for parts in zip(*found, strict=True))
        return scores, numbers

    def _row(self, number: int, score: float) -> "Row":
        details = self.gallery.details(number)
        return Row(details.product.id, score, details, self.gallery.picture(number))


@dataclass(frozen=True, eq=False)
class Row:
    """A product that was found; in a notebook it shows its picture.

    Attributes:
      id: of the product.
      score: the cosine of its picture with the query.
      details: what is stored of it.
      image_bytes: its picture, JPEG or PNG.
    """

    id: str
    score: float
    details: Details = field(repr=False)
    image_bytes: bytes = field(repr=False)

    @property
    def caption(self) -> str:
        """Its name, "" where the catalogue has none."""
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
        return (
            '<figure style="display:inline-block;width:9em;margin:.4em;vertical-align:top;text-align:center">'
            f'<img src="{source}" alt="{name}" style="max-width:100%;height:9em;object-fit:contain">'
            f'<figcaption style="font-size:.85em;line-height:1.3">{name}<br><small>{self.score:.3f}</small>'
            "</figcaption></figure>"
        )


class Results(Sequence):
    """The rows of a search, best first; in a notebook they show their pictures."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        return Results(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        return "\n".join(f"{row.score:.3f}  {row.id}  {row.caption}".rstrip() for row in self) or "nothing found"

    def _repr_html_(self) -> str:
        return "".join(row._repr_html_() for row in self) or "nothing found"


def mime(picture: bytes) -> str:
    """Returns the media type of a stored picture."""
    return "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"


def _by_filters(queries: Sequence[Query]) -> dict[tuple, list[int]]:
    rows: dict[tuple, list[int]] = {}
    for row, query in enumerate(queries):
        key = tuple(sorted((name, tuple(sorted(values))) for name, values in query.filters.items()))
        rows.setdefault(key, []).append(row)
    return rows


def _batch(count: int, sizes: Sequence[int]) -> int:
    return next((size for size in sizes if count <= size), sizes[-1])


def _blocks(rows: list, encode: Callable[[list], np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Returns encode(rows), called with numbers of rows from `sizes` only, the last row repeated to fill them up."""

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), sizes[-1]):
            block = rows[start : start + sizes[-1]]
            yield encode(block + [block[-1]] * (_batch(len(block), sizes) - len(block)))[: len(block)]

    if not rows:
        raise UserError("nothing to encode: the list is empty")
    return np.concatenate(list(blocks()))
