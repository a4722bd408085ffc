"""Exact ranks of relevant items for queries and, from the same scores, of queries for items; by counting."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclip.ranking import kernel
from jaxclip.ranking.cpu_selection import WORD
from jaxclip.ranking.layout import PRECISIONS, TILES, Layout, orders
from jaxclip.ranking.pictures import Gallery, arrange
from jaxclip.ranking.relevance import Relevance, order_relevant
from jaxclip.ranking.sweep import Pairs, Sweep, initial_scores
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import mesh_of


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks of the relevant items, and the k best items of each query.

    If queries are ranked for gallery items, the items take the place of the Q queries here, and the queries that of
    the G items.

    With products of several pictures, an item is a product.

    Attributes:
      ranks: (nnz,) int64, 1-based, one per relevant pair, aligned with `Relevance.indices`; distinct within a query.
      top_scores: (Q, k) float32, descending, NaN last.
      top_items: (Q, k) int64 gallery items; items with equal scores are in the order of `layout.orders`. In results of
        `ranks` (not of `both_ways`) that is the order of their indices if each query has one relevant item and each
        item one picture.
      nan_count: the number of NaN among the Q x G scores.
      scores: (nnz,) float32, the scores of the relevant pairs, from which their ranks follow; None after re-ranking.
    """

    ranks: np.ndarray
    top_scores: np.ndarray
    top_items: np.ndarray
    nan_count: int
    scores: np.ndarray | None = None


def make_mesh(queries: int = -1, gallery: int = 1) -> Mesh:
    """Returns all devices of all processes as a mesh of `queries` x `gallery`; -1 means as many as fit."""
    count = jax.device_count()
    sizes = (count // gallery if queries == -1 else queries, count // queries if gallery == -1 else gallery)
    return mesh_of(dict(zip(kernel.AXES, sizes, strict=True)))


def ranks(
    queries,
    gallery,
    relevance: Relevance,
    *,
    owners=None,
    top_k: int = 0,
    tile: int | None = None,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Ranks:
    """Returns the rank of each relevant item for each query, and each query's best items.

    The arguments are those of `both_ways`, but an item may be relevant to no query.
    """
    pictures = Gallery.of(gallery, owners)
    return search(
        queries, pictures, [relevance], top_k=top_k, tile=tile, products=products, mesh=mesh, progress=progress
    )[0]


def both_ways(
    queries,
    gallery,
    relevance: Relevance,
    *,
    owners=None,
    top_k: int = 0,
    tile: int | None = None,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Ranks, Ranks]:
    """Returns the ranks of gallery items for queries, and of queries for gallery items, from the same scores.

    Ties are pessimistic: a non-relevant item ranks above a relevant item with an equal score. Relevant items with equal
    scores rank by index. NaN scores rank below all others, and NaN scores of relevant items rank last.

    With `owners` an item is a product with one or more pictures, and its score is the highest of its pictures' scores;
    a NaN is below all other scores, so that the score of a product is NaN only if those of all its pictures are.
    Relevance, ranks, best items and the number of NaN then count products, never pictures.

    Args:
      queries: (Q, D) embeddings, normalised by the caller if the scores are to be cosines.
      gallery: (P, D) embeddings, of the G items or, with `owners`, of their pictures.
      relevance: the relevant items of the Q queries; its transpose gives the relevant queries of the G items.
      owners: (P,) the product of each picture, 0 to G - 1, ascending, each at least once; None = items have one
        embedding each, G = P.
      top_k: the number of best items to return for each query, and of best queries for each item; fewer if there are
        fewer.
      tile: the largest number of queries and of gallery embeddings in a tile; by default the back end's of
        `layout.TILES`. It is raised to 16 * `top_k` items if it is smaller, and rounded as in `Layout.tile` and
        `pictures.arrange`. In addition to the embeddings, each device needs memory mainly for its shard of the gallery,
        a few tiles of floats, and 8 bytes for each of the best scores.
      products: the precision of the scores, a key of `layout.PRECISIONS`; all are summed in float32. "bfloat16" rounds
        the embeddings. A score of "bfloat16_3x" has an error of less than 2^-16 of the product of both vectors'
        lengths, apart from the error of its sum; it is faster than "float32" where bfloat16 products are more than
        three times as fast (TPUs, processors with AMX).
      mesh: from `make_mesh`; default: all devices along the queries. It changes the result by rounding at most.
      progress: wraps the indices of the query blocks in each pass over the scores, for a progress bar.

    Raises:
      ValueError: the shapes, the owners or the relevance do not match; an item is relevant to no query; `products` is
        not a key of PRECISIONS; or, with "bfloat16_3x", embeddings are not finite or so large that a score might not be
        finite.
    """
    pictures = Gallery.of(gallery, owners)
    directions = [relevance, relevance.transpose(len(pictures.starts) - 1)]
    forth, back = search(
        queries, pictures, directions, top_k=top_k, tile=tile, products=products, mesh=mesh, progress=progress
    )
    return forth, back


def search(
    queries,
    gallery: Gallery,
    directions: Sequence[Relevance],
    *,
    top_k: int,
    tile: int | None = None,
    products: str = "float32",
    mesh: Mesh | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Ranks]:
    """Returns the ranks in each direction: items for queries, then queries for items if a second relevance is given.

    The arguments are those of `both_ways`. With `gallery.own` there may be only one direction, and if a query has no
    item for a place of its `top_k`, because its own is left out, then no query has that place.
    """
    relevance, reverse = directions[0], directions[1] if len(directions) > 1 else None
    queries, size = np.asarray(queries, np.float32), len(gallery.starts) - 1
    _check(queries, gallery, relevance)
    if products not in PRECISIONS:
        raise ValueError(f"products = {products!r} must be one of {', '.join(PRECISIONS)}")
    finite = _all_finite(queries, gallery.embeddings)
    if products == "bfloat16_3x" and not finite:
        raise ValueError(
            f'the precision of dot products, products = "{products}", needs finite embeddings, none so large that a '
            'score could overflow: use "float32"'
        )
    mesh = make_mesh() if mesh is None else mesh
    min_tile = WORD * min(top_k, max(len(queries), size))
    layouts = [
        Layout(embeddings, order, shards, min_tile, max(tile or TILES[compiler.backend()], min_tile), parts)
        for embeddings, order, shards, parts in zip(
            (queries, gallery.embeddings),
            orders(relevance, reverse, size),
            mesh.devices.shape,
            PRECISIONS[products],
            strict=True,
        )
    ]
    if size < len(gallery.embeddings):
        layouts[1] = arrange(layouts[1], gallery.starts)
    # For each relevant pair: the slots of its query and item, and its index among its query's pairs and among its
    # item's pairs (0 if queries are not ranked for items).
    slots = layouts[0].slots()[relevance.rows], layouts[1].slots()[relevance.indices]  # (nnz,) each
    pair_numbers = [np.arange(len(slots[0])) - relevance.indptr[relevance.rows], np.zeros(len(slots[0]), np.int64)]
    if reverse is not None:
        by_item = np.argsort(relevance.indices, kind="stable")  # the pairs in the order of `reverse`
        pair_numbers[1][by_item] = np.arange(len(by_item)) - reverse.indptr[reverse.rows]
    ks = min(top_k, size - bool(gallery.own_item_is_out.any())), min(top_k, len(queries)) if reverse is not None else 0
    hidden = None if gallery.own is None else _hidden(layouts, gallery.own)
    sweep = Sweep(mesh, layouts, Pairs(slots, pair_numbers), ks, back=reverse is not None, finite=finite, hidden=hidden)
    # A pair's threshold must be bit for bit the score that the sweep computes for it. On CPUs small tiles give the same
    # bits as large ones; elsewhere the sweep's own tiles do. The sweep returns the pairs' scores that it computed;
    # while they differ from the thresholds, they become the thresholds of another sweep.
    places, starts = _picture_pairs(layouts, gallery, relevance)
    scores = np.maximum.reduceat(initial_scores(layouts, places, finite), starts)
    with jax.set_mesh(mesh):  # replaces the mesh that the calling code may have set, whose axes may be others
        swept = sweep.run(scores, progress)
        while not np.array_equal(swept.scores, scores):
            scores = swept.scores
            swept = sweep.run(scores, progress)
    forth = _result(scores, swept.rows, relevance, layouts[1].order, swept.nan_count)
    if reverse is None:
        return [forth]
    columns = (swept.columns[0][by_item], *swept.columns[1:])
    return [forth, _result(scores[by_item], columns, reverse, layouts[0].order, swept.nan_count)]


def _picture_pairs(layouts, gallery: Gallery, relevance: Relevance):
    """Returns the places of the query and of the picture of each pair of a query and a relevant item's picture.

    The pictures of a relevant pair follow each other; those left out are missing. The second result, (nnz,), says where
    those of each relevant pair start.
    """
    counts = np.diff(gallery.starts)[relevance.indices]  # (nnz,)
    ends = np.cumsum(counts)
    pictures = np.arange(ends[-1]) + np.repeat(gallery.starts[relevance.indices] - (ends - counts), counts)
    queries = np.repeat(relevance.rows, counts)
    if gallery.own is not None:
        shown = pictures != gallery.own[queries]
        counts = np.add.reduceat(shown, ends - counts, dtype=np.int64)
        if not counts.all():
            raise ValueError("an item that is relevant to a query has no picture but the one that is left out for it")
        pictures, queries, ends = pictures[shown], queries[shown], np.cumsum(counts)
    order, starts = layouts[1].row_places()
    return (layouts[0].slots()[queries], order[starts[pictures]]), ends - counts


def _hidden(layouts, own):
    """Returns the slots of the queries that leave out a picture, and all places of these pictures, one pair each."""
    queries = np.flatnonzero(own >= 0)
    order, starts = layouts[1].row_places()
    counts = np.diff(starts)[own[queries]]
    ends = np.cumsum(counts)
    places = order[np.arange(counts.sum()) + np.repeat(starts[own[queries]] - (ends - counts), counts)]
    return np.repeat(layouts[0].slots()[queries], counts), places


def _all_finite(queries, gallery) -> bool:
    """Returns whether the largest entries show that every score of these embeddings is finite."""
    largest = [max(side.max(initial=0.0), -side.min(initial=0.0)) for side in (queries, gallery)]
    return bool(np.isfinite(largest).all() and float(largest[0]) * float(largest[1]) * queries.shape[1] < 1e38)


def _result(scores, swept, relevance, order, nan_count):
    """Returns one direction's ranks; `order` maps the slots of the best items to the items."""
    counts, values, slots = swept
    ranks = order_relevant(scores, counts, relevance)
    return Ranks(ranks, _scores(values), order[slots].astype(np.int64), nan_count, _scores(scores))


def _scores(keys):
    """Returns the float32 scores whose `kernel.keys` are given."""
    scores = np.where(keys == kernel.NAN, np.nan, np.where(keys == kernel.MINUS_INFINITY, -np.inf, keys))
    return scores.astype(np.float32)


def _check(queries, gallery: Gallery, relevance):
    pictures, size = gallery.embeddings, len(gallery.starts) - 1
    if queries.ndim != 2 or pictures.ndim != 2 or queries.shape[1] != pictures.shape[1] or not size:
        raise ValueError(f"embeddings (Q, D) and (G, D), G > 0, expected, got {queries.shape} and {pictures.shape}")
    if len(relevance.indptr) != len(queries) + 1 or (relevance.indices >= size).any():
        raise ValueError(f"the relevance does not fit {len(queries)} queries and {size} gallery items")
