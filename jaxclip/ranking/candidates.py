"""The `rerank` protocol: the first stage's top K in a new order, everything else where the first stage left it."""

from dataclasses import dataclass, replace

import numpy as np

from jaxclip.ranking.ranks import Ranks, ranks
from jaxclip.ranking.relevance import Relevance


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the first stage retrieved: nothing but its own top K, whether or not an answer is among them.

    Attributes:
      first: the ranks behind them, with the best items of each query, K or more.
      relevance: of all items.
      relevant: (Q, K) whether the K are right. One that only a tie with a wrong item brought among them is not.
    """

    first: Ranks
    relevance: Relevance
    relevant: np.ndarray

    @classmethod
    def among(cls, first: Ranks, relevance: Relevance, query_groups, gallery_groups, k: int) -> "Candidates":
        """Returns the best k items that `first` holds of each query, of groups (Q,) and (G,) as arrays."""
        same = gallery_groups[first.top_items[:, :k]] == query_groups[:, None]  # (Q, K)
        retrieved = np.add.reduceat(first.ranks <= same.shape[1], relevance.indptr[:-1], dtype=np.int64)  # (Q,)
        return cls(first, relevance, same & (np.cumsum(same, axis=1) <= retrieved[:, None]))

    @property
    def items(self) -> np.ndarray:
        """(Q, K) gallery items, best first."""
        return self.first.top_items[:, : self.relevant.shape[1]]

    @property
    def scores(self) -> np.ndarray:
        """(Q, K) of the first stage."""
        return self.first.top_scores[:, : self.relevant.shape[1]]

    @property
    def found(self) -> np.ndarray:
        """(Q,) whether any candidate is right."""
        return self.relevant.any(axis=1)

    def reordered(self, scores: np.ndarray) -> Ranks:
        """Returns the ranks after the candidates are ordered by new scores (Q, K), best first.

        An item that the first stage did not retrieve keeps its rank, which is past K. Ties are pessimistic, as in
        `ranks`: a wrong candidate with an equal score comes before a right one, right ones keep their order; NaN comes
        last. Among the best items ties keep the first stage's order.

        Raises:
          ValueError: the scores are not (Q, K).
        """
        if scores.shape != self.items.shape:
            raise ValueError(f"scores {self.items.shape} expected, got {scores.shape}")
        keys = np.where(np.isnan(scores), -np.inf, scores)
        order = np.lexsort((self.relevant, -keys), axis=1)  # (Q, K)
        position = np.empty_like(order)
        np.put_along_axis(position, order, np.arange(1, order.shape[1] + 1)[None], axis=1)
        by_rank = np.lexsort((self.first.ranks, self.relevance.rows))  # (nnz,)
        # Right candidates, by query and place, are the right items of rank K and better, by query and rank.
        retrieved = by_rank[self.first.ranks[by_rank] <= order.shape[1]]
        new = self.first.ranks.copy()
        new[retrieved] = position[self.relevant]
        best = np.argsort(-keys, axis=1, kind="stable")
        top = {
            "top_items": np.take_along_axis(self.items, best, axis=1),
            "top_scores": np.take_along_axis(scores, best, axis=1),
        }
        rest = order.shape[1]
        top = {name: np.concatenate([part, getattr(self.first, name)[:, rest:]], axis=1) for name, part in top.items()}
        return replace(self.first, ranks=new, **top)


def retrieve(queries, gallery, query_groups, gallery_groups, k: int) -> Candidates:
    """Returns the exact top k of the gallery by dot product for each query.

    Args:
      queries: (Q, D). gallery: (G, D), normalised by the caller.
      query_groups: (Q,) groups; gallery_groups: (G,). Relevant means same group.
      k: at most G are returned.

    Raises:
      UserError: a query's group is not in the gallery at all.
    """
    query_groups, gallery_groups = np.asarray(query_groups), np.asarray(gallery_groups)
    relevance = Relevance.from_groups(query_groups, gallery_groups)
    return Candidates.among(ranks(queries, gallery, relevance, top_k=k), relevance, query_groups, gallery_groups, k)


def moved(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Returns (Q,) whether the first right item comes earlier, at the same rank or later, of (Q,) ranks."""
    return {"improved": after < before, "unchanged": after == before, "worsened": after > before}
