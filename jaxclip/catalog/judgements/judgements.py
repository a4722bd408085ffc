"""Queries with judged products as arrays, and their alignment with a gallery."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.errors import UserError

SPLITS = ("", "train", "validation", "test")
HELD_BACK = ("validation", "test")
"""Values of `Judgements.splits`; "" if the file does not say. Later ones are held back more strictly."""


@dataclass(frozen=True, eq=False)
class Judgements:
    """Q queries and J judgements of P products, sorted by query.

    Attributes:
      source: the file or folder, for messages.
      texts: the Q queries exactly as they were typed, in the order of the file. They are distinct unless the file gives
        the same text several ids.
      query_ids: the file's id of each query, "" if it has none.
      splits: the split of each query, one of SPLITS.
      product_ids: the P distinct products, by the catalogue's own strings.
      queries: (J,) int32 index of each judgement's query.
      products: (J,) int32 index in `product_ids` of each judgement's product.
      grades: (J,) float32 >= 0; 0 means that the product is no answer.
      weights: (J,) float32 >= 0, such as numbers of clicks; 1 where the file has none.
      oddities: how often each kind of defect or surprise occurs in the file.
      examples: the place of the first occurrence of kinds of oddities.
    """

    source: str
    texts: list[str]
    query_ids: list[str]
    splits: list[str]
    product_ids: list[str]
    queries: np.ndarray
    products: np.ndarray
    grades: np.ndarray
    weights: np.ndarray
    oddities: dict[str, int]
    examples: dict[str, str]

    def __len__(self) -> int:
        """The number of judgements."""
        return len(self.queries)

    def has_split(self, split: str) -> bool:
        """Returns whether `of_split` finds queries of this split."""
        return split in ("", "all") or split in self.splits or (split in HELD_BACK and "" in self.splits)

    def of_split(self, split: str) -> "Judgements":
        """Returns the queries of one split; all of them if `split` is "" or "all".

        Queries for which the file names no split were made to evaluate: they belong to validation and to test, but not
        to train.

        Raises:
          UserError: no query belongs to the split.
          ValueError: `split` is not one of SPLITS or "all".
        """
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split {split!r} is not one of {SPLITS} or 'all'")
        if not self.has_split(split):
            found = ", ".join(sorted(filter(None, set(self.splits))))
            raise UserError(
                f"{self.source} has no queries of the split {split!r} "
                f"({'it has ' + found if found else 'it names no splits'}): "
                f"add a column split with the value {split} to the queries that are meant"
            )
        if split in ("", "all"):
            return self
        belonging = (split, "") if split in HELD_BACK else (split,)
        chosen = np.asarray([found in belonging for found in self.splits])
        kept = chosen[self.queries]
        used, products = np.unique(self.products[kept], return_inverse=True)
        numbers = np.cumsum(chosen) - 1

        def pick(values: list[str]) -> list[str]:
            return [values[i] for i in np.flatnonzero(chosen)]

        return Judgements(
            self.source,
            *map(pick, (self.texts, self.query_ids, self.splits)),
            [self.product_ids[i] for i in used],
            numbers[self.queries[kept]].astype(np.int32),
            products.astype(np.int32),
            self.grades[kept],
            self.weights[kept],
            self.oddities,
            self.examples,
        )

    def of(self, ids: Mapping[str, int] | Sequence[str]) -> "Aligned":
        """Returns the judgements of the products of a gallery.

        Args:
          ids: product id -> its index in the gallery; or the ids in the gallery's order.
        """
        places = ids if isinstance(ids, Mapping) else {id_: place for place, id_ in enumerate(ids)}
        place = np.fromiter((places.get(id_, -1) for id_ in self.product_ids), np.int32, len(self.product_ids))
        items = place[self.products]
        found = items >= 0
        queries, items, grades, weights = (x[found] for x in (self.queries, items, self.grades, self.weights))
        order = np.lexsort((items, queries))
        answerable = np.zeros(len(self.texts), bool)
        answerable[queries[grades > 0]] = True
        return Aligned(
            *(x[order] for x in (queries, items, grades, weights)),
            answerable=answerable,
            missing_products=int(np.sum(place < 0)),
            missing_judgements=int(np.sum(~found)),
        )


@dataclass(frozen=True, eq=False)
class Aligned:
    """The K judgements whose products are in a gallery, sorted by query, then by item.

    Attributes:
      queries: (K,) int32 index of each judgement's query among the Q queries.
      items: (K,) int32 index of its product in the gallery.
      grades: (K,) float32 >= 0.
      weights: (K,) float32 >= 0.
      answerable: (Q,) whether a query has a product of grade > 0 in the gallery.
      missing_products: number of judged products that are not in the gallery.
      missing_judgements: number of judgements of such products.
    """

    queries: np.ndarray
    items: np.ndarray
    grades: np.ndarray
    weights: np.ndarray
    answerable: np.ndarray
    missing_products: int
    missing_judgements: int
