"""Which gallery items are relevant to which query, in compressed sparse rows."""

from dataclasses import dataclass

import numpy as np

from jaxclip.errors import UserError


@dataclass(frozen=True, eq=False)
class Relevance:
    """Which gallery items are relevant to each of Q queries, in compressed sparse rows.

    Attributes:
      indptr: (Q+1,) where each query's items start in `indices`; every query has at least one item.
      indices: (nnz,) the gallery item of each of the nnz relevant pairs, strictly ascending within a query.
    """

    indptr: np.ndarray
    indices: np.ndarray

    def __post_init__(self):
        if self.indptr.ndim != 1 or self.indices.ndim != 1 or not self.indptr.size:
            raise ValueError(
                f"indptr (Q+1,) and indices (nnz,) expected, got {self.indptr.shape}, {self.indices.shape}"
            )
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.indices) or (np.diff(self.indptr) < 1).any():
            raise ValueError("indptr must rise from 0 to len(indices), with at least one relevant item per query")
        within_row = np.diff(self.rows) == 0
        if len(self.indices) and (self.indices.min() < 0 or (np.diff(self.indices)[within_row] <= 0).any()):
            raise ValueError("indices must be non-negative and strictly ascending within a query")

    @classmethod
    def from_groups(cls, query_groups, gallery_groups) -> "Relevance":
        """Returns the relevance under which an item is relevant to the queries of its group.

        Args:
          query_groups: (Q,) group names or numbers.
          gallery_groups: (G,) group names or numbers.

        Raises:
          UserError: a query's group has no item in the gallery.
        """
        query_groups, gallery_groups = np.asarray(query_groups), np.asarray(gallery_groups)
        order = np.argsort(gallery_groups, kind="stable")  # (G,)
        ordered = gallery_groups[order]
        first = np.searchsorted(ordered, query_groups, side="left")  # (Q,)
        counts = np.searchsorted(ordered, query_groups, side="right") - first  # (Q,)
        missing = np.flatnonzero(counts == 0)
        if missing.size:
            examples = ", ".join(f"query {row} (group {query_groups[row].item()!r})" for row in missing[:3])
            raise UserError(
                f"{missing.size} of {len(query_groups)} queries have no relevant item in the gallery of "
                f"{len(gallery_groups)}: {examples}{', ...' if missing.size > 3 else ''}; every query's group needs an "
                "item in the gallery"
            )
        indptr = np.concatenate([[0], np.cumsum(counts)])  # (Q+1,)
        return cls(indptr, order[np.repeat(first - indptr[:-1], counts) + np.arange(indptr[-1])])

    @classmethod
    def from_pairs(cls, rows, items, queries: int) -> "Relevance":
        """Returns the relevance of given pairs, in any order; a pair that is given twice counts once.

        Args:
          rows: (nnz,) the query of each pair. items: (nnz,) the gallery item that is relevant to it.
          queries: Q, the number of queries.

        Raises:
          UserError: a query has no relevant item.
          ValueError: there are not as many items as rows, or a row is not below Q.
        """
        rows, items = np.asarray(rows, np.int64), np.asarray(items, np.int64)
        if rows.ndim != 1 or rows.shape != items.shape or (rows.size and not 0 <= rows.min() <= rows.max() < queries):
            raise ValueError(f"rows below {queries} and as many items expected, got {rows.shape} and {items.shape}")
        rows, items = np.unique(np.stack([rows, items]), axis=1)
        counts = np.bincount(rows, minlength=queries)
        missing = np.flatnonzero(counts == 0)
        if missing.size:
            raise UserError(
                f"{missing.size} of {queries} queries have no relevant item; the first is query {missing[0]}"
            )
        return cls(np.concatenate([[0], np.cumsum(counts)]), items)

    @property
    def counts(self) -> np.ndarray:
        """(Q,) the number of items that are relevant to each query."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """(nnz,) the query of each (query, relevant item) pair."""
        return np.repeat(np.arange(len(self.indptr) - 1), self.counts)

    def transpose(self, gallery: int) -> "Relevance":
        """Returns the reverse: which queries each gallery item is relevant to; `gallery` is the number of items.

        Raises:
          ValueError: an item is relevant to no query.
        """
        order = np.argsort(self.indices, kind="stable")  # (nnz,) by item, then by query
        counts = np.bincount(self.indices, minlength=gallery)
        return Relevance(np.concatenate([[0], np.cumsum(counts)]), self.rows[order])


def order_relevant(scores: np.ndarray, at_or_above: np.ndarray, relevance: Relevance) -> np.ndarray:
    """Returns (nnz,) ranks from the pairs' scores and the counts of scores at or above each of them.

    The counts include the query's relevant items; this function orders these by score, ties by index.
    """
    rows = relevance.rows
    order = np.lexsort((relevance.indices, -scores, rows))  # (nnz,)
    score, row = scores[order], rows[order]
    tied = (row[1:] == row[:-1]) & (score[1:] == score[:-1])
    ends = np.flatnonzero(np.append(~tied, True)) + 1  # where each run of equal scores of one query ends
    run = np.cumsum(np.append(0, ~tied))[: len(order)]  # the run of each pair
    relevant_at_or_above = ends[run] - relevance.indptr[row]
    position = np.arange(len(order)) - relevance.indptr[row]
    result = np.empty(len(order), np.int64)
    result[order] = at_or_above[order] - relevant_at_or_above + position + 1
    return result
