"""Retrieval metrics per query from judgements with grades, as trec_eval computes them.

Every judged product of a query counts, whether it is in the gallery or not; a product that is not judged has no gain
and is not relevant. Queries without a relevant product have the value 0 in every metric but `judged_share`; they are
to be left out of means and counted apart, see `answered`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

GAINS = ("linear", "exponential")


@dataclass(frozen=True, eq=False)
class Judged:
    """The judged products of Q queries, in compressed sparse rows, and their ranks.

    Attributes:
      indptr: (Q + 1,) where each query's judgements start; a query may have none.
      grades: (nnz,) float64, at least 0; 0 = judged as not relevant.
      ranks: (nnz,) float64, 1-based, distinct within a query; infinite for a product that is not in the gallery.
    """

    indptr: np.ndarray
    grades: np.ndarray
    ranks: np.ndarray

    def __post_init__(self):
        indptr, grades, ranks = np.asarray(self.indptr), np.asarray(self.grades, float), np.asarray(self.ranks, float)
        if indptr.ndim != 1 or not indptr.size or indptr[0] != 0 or (np.diff(indptr) < 0).any():
            raise ValueError("indptr (Q + 1,) must rise from 0")
        if grades.shape != (indptr[-1],) or ranks.shape != grades.shape:
            raise ValueError(f"{indptr[-1]} grades and ranks expected, got {grades.shape} and {ranks.shape}")
        if not (np.isfinite(grades) & (grades >= 0)).all() or not (ranks >= 1).all():
            raise ValueError("grades must be finite and at least 0, ranks at least 1")
        for name, value in (("indptr", indptr), ("grades", grades), ("ranks", ranks)):
            object.__setattr__(self, name, value)

    @property
    def rows(self) -> np.ndarray:
        """(nnz,) the query of each judgement."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    def sums(self, values) -> np.ndarray:
        """Returns (Q,) the sum of each query's values (nnz,)."""
        return np.bincount(self.rows, values, minlength=len(self.indptr) - 1)

    def pessimistic(self, scores) -> "Judged":
        """Returns the same with judged products of equal scores ranked by ascending grade.

        Ranks that follow from scores are pessimistic towards products that are not judged, but order judged products of
        equal scores by index.

        Args:
          scores: (nnz,) the scores that the ranks follow from; those of infinite ranks have no meaning.
        """
        scores = np.asarray(scores)
        by_rank = np.lexsort((self.ranks, self.rows))
        by_score = np.lexsort((self.grades, -np.nan_to_num(scores), np.isnan(scores), np.isinf(self.ranks), self.rows))
        ranks = np.empty_like(self.ranks)
        ranks[by_score] = self.ranks[by_rank]
        return replace(self, ranks=ranks)


def answered(judged: Judged, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) whether any product of the query is relevant: graded above the threshold."""
    return judged.sums(judged.grades > threshold) > 0


def ndcg(judged: Judged, k: int, gain: str = "linear") -> np.ndarray:
    """Returns (Q,) nDCG@k: the sum of gain / log2(1 + rank) in the top k, divided by that of the best order.

    The best order has all judged products of the query by descending grade, as in trec_eval's ndcg_cut (Järvelin &
    Kekäläinen 2002).

    Args:
      judged: the judgements and ranks.
      k: at least 1.
      gain: "linear", the grade, or "exponential", 2^grade - 1 (Burges et al. 2005).

    Raises:
      ValueError: the gain is not one of GAINS.
    """
    if gain not in GAINS:
        raise ValueError(f"gain = {gain!r} must be one of {', '.join(GAINS)}")
    gains = judged.grades if gain == "linear" else np.exp2(judged.grades) - 1
    order = np.lexsort((-gains, judged.rows))
    ideal_ranks = np.empty(len(gains))
    ideal_ranks[order] = np.arange(len(gains)) - judged.indptr[judged.rows] + 1
    value, ideal = (
        judged.sums(np.where(ranks <= k, gains / np.log2(1 + ranks), 0.0)) for ranks in (judged.ranks, ideal_ranks)
    )
    return _divide(value, ideal)


def hit(judged: Judged, k: int, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) 1.0 if a product graded above the threshold is in the top k, else 0.0."""
    return (_found(judged, k, threshold) > 0).astype(np.float64)


def recall(judged: Judged, k: int, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) |relevant in the top k| / |relevant|, where relevant products are graded above the threshold."""
    return _divide(_found(judged, k, threshold), judged.sums(judged.grades > threshold))


def precision(judged: Judged, k: int, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) |relevant in the top k| / k, even if there are fewer than k products."""
    return _found(judged, k, threshold) / k


def judged_share(judged: Judged, k: int) -> np.ndarray:
    """Returns (Q,) the share of the top k places whose product is judged, with any grade."""
    return judged.sums(judged.ranks <= k) / k


def reciprocal_rank(judged: Judged, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) 1 / rank of the first relevant product, 0 without any in the gallery; its mean is MRR."""
    best = np.zeros(len(judged.indptr) - 1)
    np.maximum.at(best, judged.rows, np.where(judged.grades > threshold, 1 / judged.ranks, 0.0))
    return best


def average_precision(judged: Judged, threshold: float = 0.0) -> np.ndarray:
    """Returns (Q,) the mean precision at the ranks of all relevant products, 0 at those not in the gallery."""
    relevant = judged.grades > threshold
    rows, ranks = judged.rows[relevant], judged.ranks[relevant]
    order = np.lexsort((ranks, rows))
    counts = judged.sums(relevant)
    so_far = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
    return _divide(np.bincount(rows, so_far / ranks[order], minlength=len(counts)), counts)


def per_query(
    judged: Judged, ks: Sequence[int] = (1, 5, 10), *, gain: str = "linear", threshold: float = 0.0
) -> dict[str, np.ndarray]:
    """Returns metric -> its (Q,) values: hit@k, mrr, map, ndcg@k, recall@k, precision@k and judged@k for each of `ks`.

    The arguments are those of the metrics.
    """
    hits = {f"hit@{k}": hit(judged, k, threshold) for k in ks}
    without_k = {"mrr": reciprocal_rank(judged, threshold), "map": average_precision(judged, threshold)}
    values = {f"ndcg@{k}": ndcg(judged, k, gain) for k in ks}
    values |= {f"recall@{k}": recall(judged, k, threshold) for k in ks}
    values |= {f"precision@{k}": precision(judged, k, threshold) for k in ks}
    return hits | without_k | values | {f"judged@{k}": judged_share(judged, k) for k in ks}


def _found(judged, k, threshold):
    """Returns (Q,) the number of relevant products in the top k."""
    return judged.sums((judged.grades > threshold) & (judged.ranks <= k))


def _divide(values, by):
    """Returns values / by, 0 where `by` is 0."""
    return np.divide(values, by, out=np.zeros(len(values)), where=by > 0)
