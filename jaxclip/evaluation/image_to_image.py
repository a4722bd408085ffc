"""The protocol `image_to_image`: a picture asks for the other pictures of its product or group, itself left out."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxclip.evaluation.protocols import GroupedEmbeddings, chance, figures
from jaxclip.ranking import metrics
from jaxclip.ranking.picture_ranks import picture_ranks
from jaxclip.ranking.pictures import Gallery

QUERY, GALLERY = "query", "gallery"


def evaluate(
    products: GroupedEmbeddings,
    roles: Sequence[str],
    *,
    ks: Sequence[int],
    progress: Callable[[Iterable], Iterable] = iter,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the figures of pictures that ask for the products of their group, or the "reason" why there are none.

    "queries" counts the pictures that have an answer, "without_answer" the others, which are not averaged, and
    "gallery" the products. If the catalogue gives pictures the roles "query" and "gallery", as DeepFashion In-shop
    does, only query pictures ask, only gallery pictures are ranked, and "split" is "catalogue"; else every picture asks
    and is ranked.

    Args:
      products: the G products and their pictures.
      roles: the role of each picture, "query", "gallery" or "".
      ks: the cut-offs.
      progress: wraps the sequence of query blocks, for a progress bar.
      seed: seed of the bootstrap.
    """
    owners = np.arange(len(products.groups)) if products.owners is None else products.owners
    given = np.asarray(roles)
    has_roles = bool((given == QUERY).any() and (given == GALLERY).any())
    asking = np.flatnonzero(given == QUERY) if has_roles else np.arange(len(owners))
    ranked = np.flatnonzero(given == GALLERY) if has_roles else np.arange(len(owners))
    items, shown_owners = np.unique(owners[ranked], return_inverse=True)
    own = np.full(len(asking), -1) if has_roles else asking
    gallery = Gallery.of(products.embeddings[ranked], shown_owners, own)
    query_groups = products.groups[owners[asking]]
    found = picture_ranks(products.embeddings[asking], gallery, query_groups, products.groups[items], progress=progress)
    if found is None:
        return {"reason": "no picture has another one of its product or group"}
    indptr = found.relevance.indptr
    values = metrics.per_query(found.ranks.ranks, indptr, ks)
    return {
        **figures(metrics.best_rank(found.ranks.ranks, indptr), values, seed),
        "chance": _chance(found.relevance.counts, found.candidates, ks),
        "queries": len(found.queries),
        "without_answer": len(asking) - len(found.queries),
        "gallery": len(items),
        "pictures": len(ranked),
        "split": "catalogue" if has_roles else "all pictures",
    }


def _chance(relevant_counts: np.ndarray, candidates: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Returns the chance of queries that differ by one in their number of candidates, because their own is left out."""
    sizes, queries = np.unique(candidates, return_counts=True)
    parts = [chance(relevant_counts[candidates == size], size, ks) for size in sizes]
    return {name: float(np.average([part[name] for part in parts], weights=queries)) for name in parts[0]}
