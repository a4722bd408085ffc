"""Searches a gallery for the products nearest to sentences, pictures or products."""

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

MAX_RESULTS = 100
"""Largest number of products that a search returns."""
BATCHES = (1, 4, 8, 16, 32, 64)
"""Compiled batch sizes of queries; other batches are padded to the next size, or split if they are larger."""
PICTURE_BATCHES = (1, 4)
"""Compiled batch sizes of query pictures; encoding a picture costs so much that larger batches are not faster."""


@dataclass(frozen=True)
class QueryEncoders:
    """Functions that encode queries as unit vectors; they are compiled once per number of rows.

    Attributes:
      text: sentences -> (n, D).
      image: (n, S, S, 3) uint8 -> (n, D).
      picture: a picture as `Searcher.search` accepts it -> (S, S, 3) uint8; raises UserError if it is not a picture.
      picture_size: S, in pixels.
    """

    text: Callable[[Sequence[str]], Float[np.ndarray, "n D"]]
    image: Callable[[UInt8[np.ndarray, "n S S 3"]], Float[np.ndarray, "n D"]]
    picture: Callable[[Any], UInt8[np.ndarray, "S S 3"]]
    picture_size: int


@dataclass(frozen=True, eq=False)
class Query:
    """A query; the vectors of its sentence, picture and product, as far as they are given, are averaged.

    Attributes:
      text: a sentence, or "".
      picture: (S, S, 3) uint8, or None.
      like: index of a product of the gallery, or None; the product itself is left out of the results.
      filters: filters that the results must pass.
      k: number of results, at most MAX_RESULTS.
      rerank: whether the second stage re-orders the results; has no effect without a sentence.
    """

    text: str = ""
    picture: UInt8[np.ndarray, "S S 3"] | None = None
    like: int | None = None
    filters: Filters = field(default_factory=dict)
    k: int = 10
    rerank: bool = False


class QueryResult(NamedTuple):
    """The result of a query.

    Attributes:
      numbers: gallery indices of the products, best first; k of them, or fewer if fewer pass the filters.
      scores: the second stage's scores of products that it re-ordered, else the highest cosine of each one's
        pictures with the query.
      reordered: all products that were passed to the second stage, also those beyond k, in its order; None if it was
        not used.
    """

    numbers: np.ndarray
    scores: np.ndarray
    reordered: Reordered | None = None


class Searcher:
    """A workdir's towers over an embedded gallery, as `jaxclip.load` returns it.

    Attributes:
      gallery: the products.
      picture_size: side of the image tower's input, in pixels.
      second: the second stage, None if there is none.
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
    def vectors(self) -> Float[np.ndarray, "P D"]:
        """The unit vectors of the gallery's pictures, product by product in the order of `gallery.ids`."""
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
        """Returns up to k products nearest to a sentence, a picture, a product, or a combination of these, best first.

        If the second stage re-orders the results, its candidates, which are the nearest products, come first, in its
        order; if k is larger than their number, the next nearest products follow.

        Args:
          text: a sentence.
          image: a path, encoded bytes, a Pillow image or an (H, W, 3) uint8 array.
          like: the id of a product of the gallery; the product itself is left out of the results.
          k: from 1 to 100.
          filters: attribute -> allowed value or values, for example {"gender": "Women"}.
          rerank: whether the second stage re-orders the results by the sentence; None means yes if there is one.

        Raises:
          UserError: the query is empty, k is out of range, the picture cannot be read, or there is no such product,
            attribute, value or second stage.
        """
        if not 1 <= k <= MAX_RESULTS:
            raise UserError(f"k = {k} must be from 1 to {MAX_RESULTS}")
        number = None if like is None else self._number(like)
        filter_lists = {name: [v] if isinstance(v, str) else list(v) for name, v in (filters or {}).items()}
        picture = None if image is None else self._encoders.picture(image)
        (result,) = self.find([Query(text, picture, number, filter_lists, k, self.reranks(rerank))])
        return self._make_results(result)

    def rerank(self, text: str, products: Sequence[str] | Results) -> Results:
        """Returns products (ids, or the results of a search) in the second stage's order for a sentence.

        `Row.before` is a product's place among them by the highest cosine of its pictures with the sentence.

        Raises:
          UserError: there is no second stage, no sentence, no such product, or more products than candidates.
        """
        self.reranks(True)
        ids = [product if isinstance(product, str) else product.id for product in products]
        if not text.strip() or not ids or len(ids) > self.second.candidates:
            raise UserError(f"rerank: give a sentence and from 1 to {self.second.candidates} products")
        numbers = np.asarray([self._number(id) for id in ids])
        vector = self.encode_text(text)
        scores = np.array([(self._neighbours.of_product(number) @ vector).max() for number in numbers])
        order = np.argsort(-scores, kind="stable")
        (reordered,) = self._reorder([text], vector[None], [(numbers[order], scores[order])])
        return self._make_results(QueryResult(reordered.numbers, reordered.scores, reordered))

    def reranks(self, requested: bool | None) -> bool:
        """Returns whether the second stage re-orders results; raises UserError if it is requested but missing."""
        if requested and self.second is None:
            raise UserError("rerank: there is no second stage; give the workdir of a re-ranker as --rerank or rerank=")
        return self.second is not None if requested is None else requested

    def encode_text(self, text: str | Sequence[str]) -> np.ndarray:
        """Returns the unit vector of a sentence, (D,), or the vectors of a list of sentences, (n, D)."""
        vectors = _encode_blocks([text] if isinstance(text, str) else list(text), self._encoders.text, BATCHES)
        return vectors[0] if isinstance(text, str) else vectors

    def encode_image(self, image: Any) -> np.ndarray:
        """Returns the unit vector of a picture, (D,), or the vectors of a list of pictures, (n, D).

        A picture is what `search` accepts as its `image`.
        """
        images = image if isinstance(image, list) else [image]
        vectors = self._encode_pictures([self._encoders.picture(one) for one in images])
        return vectors if isinstance(image, list) else vectors[0]

    def read_picture(self, image: Any) -> UInt8[np.ndarray, "S S 3"]:
        """Returns a picture preprocessed for a `Query`; raises UserError if it is not a picture."""
        return self._encoders.picture(image)

    def find(self, queries: Sequence[Query]) -> list[QueryResult]:
        """Returns the exact nearest products of each query; the second stage re-orders them if `Query.rerank` is set.

        Raises:
          UserError: a query is empty, or filters by an attribute or value that the gallery does not have.
        """
        vectors, sentence_vectors = self._encode(queries)
        nearest: list[tuple[np.ndarray, np.ndarray]] = [()] * len(queries)
        for filters, rows in _by_filters(queries).items():
            allowed = self.gallery.allowed(dict(filters))
            scores, numbers = self._find_neighbours(vectors[rows], allowed)
            for row, row_scores, row_numbers in zip(rows, scores, numbers, strict=True):
                others = row_numbers != (-1 if queries[row].like is None else queries[row].like)
                nearest[row] = row_numbers[others], row_scores[others]
        results = [
            QueryResult(numbers[: query.k], scores[: query.k])
            for query, (numbers, scores) in zip(queries, nearest, strict=True)
        ]
        if rows := [row for row, query in enumerate(queries) if query.rerank and query.text.strip()]:
            lists = [
                tuple(part[: max(queries[row].k, self.second.candidates)] for part in nearest[row]) for row in rows
            ]
            reordered = self._reorder([queries[row].text for row in rows], sentence_vectors[rows], lists)
            for row, second in zip(rows, reordered, strict=True):
                results[row] = QueryResult(second.numbers[: queries[row].k], second.scores[: queries[row].k], second)
        return results

    def _reorder(
        self, sentences: list[str], vectors: np.ndarray, lists: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[Reordered]:
        """Returns the queries' lists (indices, scores) in the second stage's order; pads to a compiled batch size."""
        reordered = []
        for start in range(0, len(sentences), BATCHES[-1]):
            rows = list(range(start, min(start + BATCHES[-1], len(sentences))))
            padded = rows + rows[-1:] * (_batch_size(len(rows), BATCHES) - len(rows))
            numbers, scores = zip(*(lists[row] for row in padded), strict=True)
            texts = [sentences[row] for row in padded]
            reordered += reorder(self.second, texts, vectors[padded], numbers, scores)[: len(rows)]
        return reordered

    def _encode(self, queries: Sequence[Query]) -> tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "n D"]]:
        """Returns the unit vectors of queries, and of their sentences alone (zero without a sentence).

        Raises:
          UserError: a query is empty.
        """
        sentence_vectors = np.zeros((len(queries), self._neighbours.dimension), np.float32)
        if rows := [row for row, query in enumerate(queries) if query.text.strip()]:
            sentence_vectors[rows] = self.encode_text([queries[row].text for row in rows])
        total = sentence_vectors.copy()
        if rows := [row for row, query in enumerate(queries) if query.picture is not None]:
            total[rows] += self._encode_pictures([queries[row].picture for row in rows])
        for row, query in enumerate(queries):
            if query.like is not None:
                mean = self._neighbours.of_product(query.like).mean(axis=0)
                total[row] += mean / np.maximum(np.linalg.norm(mean), 1e-6)
            elif not query.text.strip() and query.picture is None:
                raise UserError("the query is empty: give a sentence, a picture or a product")
        return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6), sentence_vectors

    def warm_up(self) -> None:
        """Compiles every batch size, so that the first searches do not wait for compilation."""
        picture = self._encoders.picture(self.gallery.pictures(0)[0])
        for size in PICTURE_BATCHES:
            self._encode_pictures([picture] * size)
        for size in BATCHES:
            self.find([Query(text="warm", like=0, rerank=self.second is not None)] * size)

    def _encode_pictures(self, pictures: list) -> np.ndarray:
        return _encode_blocks(pictures, lambda rows: self._encoders.image(np.stack(rows)), PICTURE_BATCHES)

    def _find_neighbours(self, vectors: np.ndarray, allowed: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        blocks = padded_blocks(vectors, _batch_size(len(vectors), BATCHES))
        nearest = [self._neighbours(block, allowed) for block in blocks]
        scores, numbers = (np.concatenate(parts)[: len(vectors)] for parts in zip(*nearest, strict=True))
        return scores, numbers

    def _number(self, id: str) -> int:
        number = self.gallery.number(id)
        if number is None:
            raise UserError(f"the gallery has no product {id!r}: give the id of one of its products")
        return number

    def _make_results(self, result: QueryResult) -> Results:
        rows = []
        for place, (number, score) in enumerate(zip(result.numbers, result.scores, strict=True)):
            second = result.reordered
            why = {} if second is None else reasons(self.second, second, place)
            before = None if second is None else int(second.before[place])
            id, details = self.gallery.ids[number], self.gallery.details(int(number))
            rows.append(Row(id, float(score), place + 1, before, why, details, self.gallery.pictures(int(number))[0]))
        return Results(rows)


def reasons(stage: SecondStage, reordered: Reordered, place: int) -> dict[str, Reason]:
    """Returns feature -> its effect on the product at a place (from 0); empty without gates or for non-candidates."""
    if np.isnan(reordered.added[place]).any():
        return {}
    columns = zip(stage.features, reordered.gates.tolist(), reordered.added[place].tolist(), strict=True)
    return {name: Reason(gate, added) for name, gate, added in columns}


def _by_filters(queries: Sequence[Query]) -> dict[tuple, list[int]]:
    """Returns the indices of the queries, grouped by their filters."""
    rows: dict[tuple, list[int]] = {}
    for row, query in enumerate(queries):
        key = tuple(sorted((name, tuple(sorted(values))) for name, values in query.filters.items()))
        rows.setdefault(key, []).append(row)
    return rows


def _batch_size(count: int, sizes: Sequence[int]) -> int:
    """Returns the smallest size that holds `count` rows, or the largest size if none does."""
    return next((size for size in sizes if count <= size), sizes[-1])


def _encode_blocks(rows: list, encode: Callable[[list], np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Returns encode(rows), computed in blocks whose sizes are in `sizes`; the last row is repeated as padding."""

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), sizes[-1]):
            block = rows[start : start + sizes[-1]]
            yield encode(block + [block[-1]] * (_batch_size(len(block), sizes) - len(block)))[: len(block)]

    if not rows:
        raise UserError("nothing to encode: the list is empty")
    return np.concatenate(list(blocks()))
