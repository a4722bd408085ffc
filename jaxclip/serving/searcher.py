"""Search: sentences, pictures or products in, the nearest products of a gallery out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxclip.errors import UserError
from jaxclip.ranking.index import NearestNeighbours
from jaxclip.serving.gallery import Filters, Gallery
from jaxclip.serving.reordering import Reordered, SecondStage, reorder
from jaxclip.serving.rows import Reason, Results, Row
from jaxclip.towers.embed import padded_blocks

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
      rerank: whether the second stage orders them, which reads sentences: without one the first stage's order stays.
    """

    text: str = ""
    picture: UInt8[np.ndarray, "S S 3"] | None = None
    like: int | None = None
    filters: Filters = field(default_factory=dict)
    k: int = 10
    rerank: bool = False


class Found(NamedTuple):
    """What was found for a query.

    Attributes:
      numbers: of the k products, best first.
      scores: cosines of their pictures with the query, or the second stage's scores.
      reordered: the second stage's candidates and what else it was given, None where it did not order them.
    """

    numbers: np.ndarray
    scores: np.ndarray
    reordered: Reordered | None = None


class Searcher:
    """A workdir's towers over an embedded gallery, as `jaxclip.load` returns it.

    Attributes:
      gallery: the products.
      picture_size: side of the pictures that the image tower sees, pixels.
      second: the second stage, None where there is none.
    """

    def __init__(
        self,
        gallery: Gallery,
        neighbours: NearestNeighbours,
        encoders: QueryEncoders,
        second: SecondStage | None = None,
    ):
        self.gallery, self.second, self._neighbours, self._encoders = gallery, second, neighbours, encoders
        self.picture_size = encoders.picture_size

    @property
    def vectors(self) -> Float[np.ndarray, "G D"]:
        """The unit vectors of the gallery's pictures, in the order of `gallery.ids`."""
        return self._neighbours.vectors

    def search(
        self,
        text: str = "",
        *,
        image: Any = None,
        like: str | None = None,
        k: int = 10,
        filters: Filters | None = None,
        rerank: bool | None = None,
    ) -> Results:
        """Returns the k products nearest to a sentence, a picture, a product, or any of them together.

        Args:
          text: a sentence.
          image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
          like: the id of a product of the gallery.
          k: from 1 to 100.
          filters: attribute -> the value or values it may have, as {"gender": "Women"}.
          rerank: whether the second stage orders them by the sentence; None: where there is one.

        Raises:
          UserError: nothing is asked for, or for something the gallery or the searcher does not have.
        """
        if not 1 <= k <= MOST:
            raise UserError(f"k = {k} must be from 1 to {MOST}")
        number = None if like is None else self._number(like)
        wanted = {name: [v] if isinstance(v, str) else list(v) for name, v in (filters or {}).items()}
        picture = None if image is None else self._encoders.picture(image)
        (found,) = self.find([Query(text, picture, number, wanted, k, self.reranks(rerank))])
        return self._results(found)

    def rerank(self, text: str, products: Sequence[str] | Results) -> Results:
        """Returns products, by id or as a search found them, in the second stage's order for a sentence.

        Their places before are those by the cosine of picture and sentence, among these products alone.

        Raises:
          UserError: there is no second stage, no sentence, no such product, or more products than it looks at.
        """
        self.reranks(True)
        ids = [product if isinstance(product, str) else product.id for product in products]
        if not text.strip() or not ids or len(ids) > self.second.candidates:
            raise UserError(f"rerank takes a sentence and from 1 to {self.second.candidates} products")
        numbers = np.asarray([self._number(id) for id in ids])
        vector = self.encode_text(text)
        scores = np.stack([self._neighbours.vector(number) for number in numbers]) @ vector
        order = np.argsort(-scores, kind="stable")
        (found,) = self._reorder([text], vector[None], [(numbers[order], scores[order])])
        return self._results(Found(found.numbers, found.scores, found))

    def reranks(self, asked: bool | None) -> bool:
        """Returns whether the second stage orders what is found; UserError where it is asked for and there is none."""
        if asked and self.second is None:
            raise UserError("rerank: there is no second stage; give the workdir of a re-ranker as --rerank or rerank=")
        return self.second is not None if asked is None else asked

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
        """Returns what is nearest to each query: the first stage, exact, and the second where a query asks for it.

        Raises:
          UserError: a query asks for nothing, or filters by what the gallery does not have.
        """
        vectors, words = self._vectors(queries)
        nearest: list[tuple[np.ndarray, np.ndarray]] = [()] * len(queries)
        for filters, rows in _by_filters(queries).items():
            allowed = self.gallery.allowed(dict(filters))
            scores, numbers = self._neighbours_of(vectors[rows], allowed)
            for row, own_scores, own_numbers in zip(rows, scores, numbers, strict=True):
                kept = own_numbers != (-1 if queries[row].like is None else queries[row].like)
                nearest[row] = own_numbers[kept], own_scores[kept]
        found = [
            Found(numbers[: query.k], scores[: query.k])
            for query, (numbers, scores) in zip(queries, nearest, strict=True)
        ]
        if chosen := [row for row, query in enumerate(queries) if query.rerank and query.text.strip()]:
            lists = [
                tuple(part[: max(queries[row].k, self.second.candidates)] for part in nearest[row]) for row in chosen
            ]
            reordered = self._reorder([queries[row].text for row in chosen], words[chosen], lists)
            for row, second in zip(chosen, reordered, strict=True):
                found[row] = Found(second.numbers[: queries[row].k], second.scores[: queries[row].k], second)
        return found

    def _reorder(
        self, sentences: list[str], vectors: np.ndarray, lists: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[Reordered]:
        found = []
        for start in range(0, len(sentences), BATCHES[-1]):
            rows = list(range(start, min(start + BATCHES[-1], len(sentences))))
            filled = rows + rows[-1:] * (_batch(len(rows), BATCHES) - len(rows))
            chosen = zip(*(lists[row] for row in filled), strict=True)
            found += reorder(self.second, [sentences[row] for row in filled], vectors[filled], *chosen)[: len(rows)]
        return found

    def _vectors(self, queries: Sequence[Query]) -> tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "n D"]]:
        """Returns the unit vectors of queries and, zero where there is none, of their sentences.

        UserError where one asks for nothing.
        """
        words = np.zeros((len(queries), self._neighbours.dimension), np.float32)
        if rows := [row for row, query in enumerate(queries) if query.text.strip()]:
            words[rows] = self.encode_text([queries[row].text for row in rows])
        total = words.copy()
        if rows := [row for row, query in enumerate(queries) if query.picture is not None]:
            total[rows] += self._encode_pictures([queries[row].picture for row in rows])
        for row, query in enumerate(queries):
            if query.like is not None:
                total[row] += self._neighbours.vector(query.like)
            elif not query.text.strip() and query.picture is None:
                raise UserError("nothing is searched for: give a sentence, a picture or a product")
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6), words

    def warm_up(self) -> None:
        """Compiles all that searches need, so that the first ones do not wait for it."""
        picture = self._encoders.picture(self.gallery.picture(0))
        for size in PICTURE_BATCHES:
            self._encode_pictures([picture] * size)
        for size in BATCHES:
            self.find([Query(text="warm", like=0, rerank=self.second is not None)] * size)

    def _encode_pictures(self, pictures: list) -> np.ndarray:
        return _blocks(pictures, lambda rows: self._encoders.image(np.stack(rows)), PICTURE_BATCHES)

    def _neighbours_of(self, vectors: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        found = [self._neighbours(block, allowed) for block in padded_blocks(vectors, _batch(len(vectors), BATCHES))]
        scores, numbers = (np.concatenate(parts)[: len(vectors)] for parts in zip(*found, strict=True))
        return scores, numbers

    def _number(self, id: str) -> int:
        number = self.gallery.number(id)
        if number is None:
            raise UserError(f"the gallery has no product {id!r}")
        return number

    def _results(self, found: Found) -> Results:
        rows = []
        for place, (number, score) in enumerate(zip(found.numbers, found.scores, strict=True)):
            second = found.reordered
            why = {} if second is None else reasons(self.second, second, place)
            before = None if second is None else int(second.before[place])
            id, details = self.gallery.ids[number], self.gallery.details(int(number))
            rows.append(Row(id, float(score), place + 1, before, why, details, self.gallery.picture(int(number))))
        return Results(rows)


def reasons(stage: SecondStage, found: Reordered, place: int) -> dict[str, Reason]:
    """Returns what each feature did to the product at a place; nothing where the second stage did not look at it."""
    if np.isnan(found.added[place]).any():
        return {}
    columns = zip(stage.features, found.gates.tolist(), found.added[place].tolist(), strict=True)
    return {name: Reason(gate, added) for name, gate, added in columns}


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
