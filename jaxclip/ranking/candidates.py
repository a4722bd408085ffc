"""The `rerank` protocol: the first stage's top K are re-ordered, and all other items keep their ranks."""

from dataclasses import dataclass, replace

import numpy as np

from jaxclip.ranking.ranks import Ranks, ranks
from jaxclip.ranking.relevance import Relevance


@dataclass(frozen=True, eq=False)
class Candidates:
    """The first stage's top K of each query, exactly as retrieved, whether or not a relevant item is among them.

    Attributes:
      first: the first stage's ranks, with at least K best items for each query.
      relevance: the relevant items of each query.
      relevant: (Q, K) whether each candidate counts as relevant. A relevant item that is in the top K only because of a
        tie, while its pessimistic rank is beyond K, does not count.
    """

    first: Ranks
    relevance: Relevance
    relevant: np.ndarray

    @classmethod
    def among(cls, first: Ranks, relevance: Relevance, query_groups, gallery_groups, k: int) -> "Candidates":
        """Returns each query's best k items in `first` as candidates, or all its best items if it has fewer.

        An item is relevant to the queries of its group: `query_groups` are (Q,), `gallery_groups` (G,).
        """
        same_group = gallery_groups[first.top_items[:, :k]] == query_groups[:, None]  # (Q, K)
        retrieved = np.add.reduceat(first.ranks <= same_group.shape[1], relevance.indptr[:-1], dtype=np.int64)  # (Q,)
        return cls(first, relevance, same_group & (np.cumsum(same_group, axis=1) <= retrieved[:, None]))

    @property
    def items(self) -> np.ndarray:
        """(Q, K) gallery items, best first."""
        return self.first.top_items[:, : self.relevant.shape[1]]

    @property
    def scores(self) -> np.ndarray:
        """(Q, K) the first stage's scores."""
        return self.first.top_scores[:, : self.relevant.shape[1]]

    @property
    def found(self) -> np.ndarray:
        """(Q,) whether any candidate is relevant."""
        return self.relevant.any(axis=1)

    def reordered(self, scores: np.ndarray) -> Ranks:
        """Returns the ranks after the candidates are ordered by new scores (Q, K), best first.

        A relevant item whose rank is beyond K keeps it. Ties are pessimistic, as in `ranks`: a non-relevant candidate
        comes before a relevant one with an equal score, relevant ones keep their order, and NaN counts as -inf. In
        `top_items` ties keep the first stage's order. `top_scores` are the new scores of the candidates, and after them
        the first stage's scores.

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
        # Both sides are in order of query and first-stage rank: the relevant items of rank K or better, and the new
        # positions of the relevant candidates, read row by row.
        retrieved = by_rank[self.first.ranks[by_rank] <= order.shape[1]]
        new_ranks = self.first.ranks.copy()
        new_ranks[retrieved] = position[self.relevant]
        best = np.argsort(-keys, axis=1, kind="stable")
        top = {
            "top_items": np.take_along_axis(self.items, best, axis=1),
            "top_scores": np.take_along_axis(scores, best, axis=1),
        }
        k = order.shape[1]
        top = {name: np.concatenate([part, getattr(self.first, name)[:, k:]], axis=1) for name, part in top.items()}
        return replace(self.first, ranks=new_ranks, scores=None, **top)


def retrieve(queries, gallery, query_groups, gallery_groups, k: int, *, picture_owners=None) -> Candidates:
    """Returns the exact top k of the gallery by dot product for each query.

    Args:
      queries: (Q, D) embeddings, normalised by the caller if the scores are to be cosines.
      gallery: (G, D) embeddings, normalised likewise.
      query_groups: (Q,) groups. gallery_groups: (G,) groups; an item is relevant to the queries of its group.
      k: number of candidates; at most G are returned.
      picture_owners: (P,) ascending item of each picture, if `gallery` has the embeddings (P, D) of the items'
        pictures, of which the highest score counts; None if each item has one.

    Raises:
      UserError: a query's group has no item in the gallery.
    """
    query_groups, gallery_groups = np.asarray(query_groups), np.asarray(gallery_groups)
    relevance = Relevance.from_groups(query_groups, gallery_groups)
    return Candidates.among(
        ranks(queries, gallery, relevance, top_k=k, owners=picture_owners), relevance, query_groups, gallery_groups, k
    )


def rank_changes(before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    """Returns "improved", "unchanged" and "worsened" -> (Q,) whether this happened to each query's best rank.

    `before` and `after` are (Q,) the lowest rank of any relevant item; before and after, this may be another item.
    """
    return {"improved": after < before, "unchanged": after == before, "worsened": after > before}
