"""Re-orders the first stage's products by a second stage, and keeps the effect of each feature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Scored(NamedTuple):
    """A second stage's scores of the K candidates of each of n queries.

    Attributes:
      scores: second-stage score of each candidate.
      gates: weight of each of F features for each query, from 0 to 2; F is 0 if the model has no gates.
      added: contribution of each feature to the score, in addition to the first-stage score.
    """

    scores: Float[np.ndarray, "n K"]
    gates: Float[np.ndarray, "n F"]
    added: Float[np.ndarray, "n F K"]


@dataclass(frozen=True)
class SecondStage:
    """A re-ranker that re-orders the candidates of the first stage.

    Attributes:
      name: name for display.
      candidates: K, the number of candidates per query.
      features: names of the F gated features; empty if the model has no gates.
      score: (sentences, their (n, D) unit vectors, (n, K) gallery indices, (n, K) first-stage scores, (n, K) mask of
        candidates that exist) -> Scored; compiled for each n.
    """

    name: str
    candidates: int
    features: tuple[str, ...]
    score: Callable[..., Scored]


@dataclass(frozen=True, eq=False)
class Reordered:
    """The M products of one query in their new order; only the first K, the second stage's candidates, are re-ordered.

    Attributes:
      numbers: indices of the products in the gallery, best first.
      scores: second-stage scores; after the first K, first-stage scores.
      before: place of each product in the first stage, from 1.
      first: first-stage scores.
      gates: weights of the F features for the query (see `Scored`).
      added: contribution of each feature to each score; NaN after the first K.
    """

    numbers: Int[np.ndarray, "M"]
    scores: Float[np.ndarray, "M"]
    before: Int[np.ndarray, "M"]
    first: Float[np.ndarray, "M"]
    gates: Float[np.ndarray, "F"]
    added: Float[np.ndarray, "M F"]


def reorder(
    stage: SecondStage,
    sentences: Sequence[str],
    vectors: Float[np.ndarray, "n D"],
    numbers: Sequence[Int[np.ndarray, "M"]],
    scores: Sequence[Float[np.ndarray, "M"]],
) -> list[Reordered]:
    """Returns each query's M products, the first K (`stage.candidates`) of them in the second stage's order.

    Ties keep the first stage's order, and NaN scores come last among the K.

    Args:
      stage: the second stage.
      sentences: sentence of each query.
      vectors: unit vectors of the sentences.
      numbers: for each query, the indices of the first stage's products, best first; lists may differ in length.
      scores: for each query, the first-stage scores of these products.
    """
    shape = len(sentences), stage.candidates
    items, first, exists = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, (row_numbers, row_scores) in enumerate(zip(numbers, scores, strict=True)):
        count = min(len(row_numbers), stage.candidates)
        items[row, :count], first[row, :count], exists[row, :count] = row_numbers[:count], row_scores[:count], True
    scored = stage.score(sentences, vectors, items, first, exists)
    return [_reorder_one(scored, row, int(mask.sum()), numbers[row], scores[row]) for row, mask in enumerate(exists)]


def _reorder_one(scored: Scored, row: int, count: int, numbers: np.ndarray, scores: np.ndarray) -> Reordered:
    """Returns the products of the query at `row`, which has `count` candidates, in their new order."""
    new_scores = scored.scores[row, :count]
    order = np.argsort(np.where(np.isnan(new_scores), np.inf, -new_scores), kind="stable")
    places = np.concatenate([order, np.arange(count, len(numbers))])
    added = np.full((len(numbers), scored.added.shape[1]), np.nan, np.float32)
    added[:count] = scored.added[row, :, :count].T
    return Reordered(
        numbers=numbers[places],
        scores=np.concatenate([new_scores, scores[count:]])[places],
        before=places + 1,
        first=scores[places],
        gates=scored.gates[row],
        added=added[places],
    )
