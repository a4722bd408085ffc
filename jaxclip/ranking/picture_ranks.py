"""Ranks of products for pictures ("find similar"): each picture asks for its group, and is itself left out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from jaxclip.ranking.pictures import Gallery
from jaxclip.ranking.ranks import Ranks, search
from jaxclip.ranking.relevance import Relevance


@dataclass(frozen=True, eq=False)
class PictureRanks:
    """The ranks of products for those pictures that have an answer.

    Attributes:
      queries: (A,) the queries for which a product is relevant, ascending; all others have no answer.
      relevance: the relevant products of these A queries, in their order.
      ranks: the ranks of these A queries, as `ranks.ranks` returns them.
      candidates: (A,) the number of products that are ranked for each: G, or G - 1 if its own product has no picture
        but the query itself.
    """

    queries: np.ndarray
    relevance: Relevance
    ranks: Ranks
    candidates: np.ndarray


def picture_ranks(
    queries,
    gallery: Gallery,
    query_groups,
    groups,
    *,
    top_k: int = 0,
    tile: int | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> PictureRanks | None:
    """Returns the ranks of the products of each picture's group, or None if no picture has an answer.

    The products of the query's group are relevant. `gallery.own` names the query's own picture where it is in the
    gallery: it is left out, so that its product is found by its other pictures alone; a product without any other is
    neither a candidate nor relevant. The scores of products, ties and NaN are those of `ranks.both_ways`.

    Args:
      queries: (Q, D) embeddings of pictures.
      gallery: the P pictures of G products, and `own` (Q,).
      query_groups: (Q,) the group of each query; a group without a product has no answer.
      groups: (G,) the group of each product.
      top_k, tile, mesh, progress: as in `ranks.both_ways`. If a query has no product for a place of its `top_k`,
        because its own is left out, then no query has that place.

    Raises:
      ValueError: the shapes do not match.
    """
    queries, size = np.asarray(queries, np.float32), len(gallery.starts) - 1
    query_groups, groups = np.asarray(query_groups), np.asarray(groups)
    own = np.full(len(queries), -1) if gallery.own is None else gallery.own
    if not len(queries) == len(query_groups) == len(own) or len(groups) != size:
        raise ValueError(
            f"{len(queries)} queries with {len(query_groups)} groups and {len(own)} own pictures, {size} products with "
            f"{len(groups)} groups"
        )
    gallery = replace(gallery, own=own)
    out = gallery.own_item_is_out  # (Q,)
    order = np.argsort(groups, kind="stable")
    first, last = (np.searchsorted(groups[order], query_groups, side=side) for side in ("left", "right"))
    rows = np.repeat(np.arange(len(queries)), last - first)
    products = order[np.arange(len(rows)) - np.repeat(np.cumsum(last - first) - last, last - first)]
    relevant = ~(out[rows] & (products == gallery.own_item[rows]))
    rows, products = rows[relevant], products[relevant]
    answered, counts = np.unique(rows, return_counts=True)
    if not len(answered):
        return None
    relevance = Relevance(np.concatenate([[0], np.cumsum(counts)]), products)
    shown = replace(gallery, own=own[answered])
    result = search(queries[answered], shown, [relevance], top_k=top_k, tile=tile, mesh=mesh, progress=progress)[0]
    return PictureRanks(answered, relevance, result, size - out[answered].astype(np.int64))
