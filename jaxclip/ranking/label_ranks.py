"""Ranks for queries with many relevant items (a colour, a category), by sorting each query's scores once."""

import jax
import numpy as np

from jaxclip.ranking import kernel
from jaxclip.ranking.pictures import first_pictures
from jaxclip.ranking.relevance import Relevance, order_relevant

BLOCK, TILE = 64, 4096


def label_ranks(queries, gallery, relevance: Relevance, *, owners=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ranks (nnz,) that `ranks.ranks` returns, and the scores (nnz,) that they follow from.

    It needs no pass over the scores for each relevant item.

    It is meant for a few hundred queries, because it sorts the scores of the whole gallery for each. It holds the
    gallery on the device, and the scores of 64 queries at a time.

    Args:
      queries: (Q, D) embeddings.
      gallery: (P, D) embeddings, of the G items or, with `owners`, of their pictures.
      relevance: the relevant items of the queries.
      owners: (P,) as in `ranks.both_ways`; None = items have one embedding each.

    Raises:
      ValueError: the owners do not match the gallery.
    """
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    starts = None if owners is None else first_pictures(owners, len(gallery))[:-1]
    scores, at_or_above = np.empty(len(relevance.indices), np.float32), np.empty(len(relevance.indices), np.int64)
    tiles = [jax.device_put(_pad(gallery[first : first + TILE])) for first in range(0, len(gallery), TILE)]
    for start in range(0, len(queries), BLOCK):
        block = np.pad(queries[start : start + BLOCK], ((0, max(0, start + BLOCK - len(queries))), (0, 0)))
        parts = jax.device_get([kernel.product_keys(block, tile, finite=False) for tile in tiles])
        block_scores = np.concatenate(parts, axis=1)[:, : len(gallery)]  # (BLOCK, P)
        if starts is not None:
            block_scores = np.maximum.reduceat(block_scores, starts, axis=1)  # (BLOCK, G)
        for row in range(start, min(start + BLOCK, len(queries))):
            pairs = slice(relevance.indptr[row], relevance.indptr[row + 1])
            scores[pairs] = block_scores[row - start, relevance.indices[pairs]]
            ascending = np.sort(block_scores[row - start])
            at_or_above[pairs] = len(ascending) - np.searchsorted(ascending, scores[pairs], side="left")
    return order_relevant(scores, at_or_above, relevance), scores


def _pad(rows):
    """Returns the rows with zeros appended up to TILE rows."""
    return np.pad(rows, ((0, TILE - len(rows)), (0, 0)))
