"""A second stage as a search uses it: the first stage's nearest products in a new order, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Scored(NamedTuple):
    """What a second stage makes of the candidates of queries.

    Attributes:
      scores: by which they are ordered.
      gates: the weight, from 0 to 2, of each feature for each query; no features where the model has no gates.
      added: what each feature adds to the first stage's score.
    """

    scores: Float[np.ndarray, "n K"]
    gates: Float[np.ndarray, "n F"]
    added: Float[np.ndarray, "n F K"]


@dataclass(frozen=True)
class SecondStage:
    """What re-orders candidates.

    Attributes:
      name: for people.
      candidates: K, how many of the first stage's it looks at.
      features: F names of what it weighs; none where the model has no gates.
      judge: (sentences, their (n, D) unit vectors, (n, K) numbers of products, (n, K) first-stage scores, (n, K)
        whether there is such a candidate) -> Scored; compiled for each n.
    """

    name: str
    candidates: int
    features: tuple[str, ...]
    judge: Callable[..., Scored]


@dataclass(frozen=True, eq=False)
class Reordered:
    """One query's candidates in their new order: M of them.

    Attributes:
      numbers, scores: of the products, best first, by the second stage; past its candidates as the first left them.
      before: (M,) each one's place in the first stage, from 1.
      first: (M,) each one's score there.
      gates: (F,) of the query.
      added: (M, F) to each one's score; NaN past the candidates.
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
    """Returns each query's products with the first K in the second stage's order; ties keep the first's, NaN is last.

    Args:
      stage: the second stage.
      sentences: of the queries. vectors: of the sentences.
      numbers, scores: of each query's products in the first stage, best first; any number of them.
    """
    shape = len(sentences), stage.candidates
    items, first, there = np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, bool)
    for row, (own, own_scores) in enumerate(zip(numbers, scores, strict=True)):
        count = min(len(own), stage.candidates)
        items[row, :count], first[row, :count], there[row, :count] = own[:count], own_scores[:count], True
    judged = stage.judge(sentences, vectors, items, first, there)
    return [_ordered(judged, row, int(mine.sum()), numbers[row], scores[row]) for row, mine in enumerate(there)]


def _ordered(judged: Scored, row: int, count: int, numbers: np.ndarray, scores: np.ndarray) -> Reordered:
    found = judged.scores[row, :count]
    order = np.argsort(np.where(np.isnan(found), np.inf, -found), kind="stable")
    places = np.concatenate([order, np.arange(count, len(numbers))])
    added = np.full((len(numbers), judged.added.shape[1]), np.nan, np.float32)
    added[:count] = judged.added[row, :, :count].T
    return Reordered(
        numbers=numbers[places],
        scores=np.concatenate([found, scores[count:]])[places],
        before=places + 1,
        first=scores[places],
        gates=judged.gates[row],
        added=added[places],
    )
