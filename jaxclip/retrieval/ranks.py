"""Exact ranks of the relevant items, by counting: the score matrix exists one tile at a time, never whole."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxclip.errors import UserError

# Below every finite score, in this order, so that top-k needs no second key: -inf scores, then NaN, then padding.
_MINUS_INFINITY, _NAN, _EMPTY = -3.2e38, -3.3e38, -np.inf


@dataclass(frozen=True, eq=False)
class Relevance:
    """Which gallery items are right for each query, in compressed sparse rows.

    Attributes:
      indptr: (Q+1,) where each query's items start in `indices`; every query has at least one.
      indices: (nnz,) gallery items, ascending within a query, none twice.
    """

    indptr: np.ndarray
    indices: np.ndarray

    def __post_init__(self):
        if self.indptr.ndim != 1 or self.indices.ndim != 1 or not self.indptr.size:
            raise ValueError(
                f"indptr (Q+1,) and indices (nnz,) expected, got {self.indptr.shape}, {self.indices.shape}"
            )
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.indices) or (np.diff(self.indptr) < 1).any():
            raise ValueError("indptr must rise from 0 to len(indices), at least one relevant item per query")
        within_row = np.diff(self.rows) == 0
        if len(self.indices) and (self.indices.min() < 0 or (np.diff(self.indices)[within_row] <= 0).any()):
            raise ValueError("indices must be non-negative and strictly ascending within a query")

    @classmethod
    def from_groups(cls, query_groups, gallery_groups) -> "Relevance":
        """Returns the relevance that says: same group, relevant.

        Args:
          query_groups: (Q,) group names or numbers.
          gallery_groups: (G,) of the same kind.

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
            named = ", ".join(f"query {row} (group {query_groups[row].item()!r})" for row in missing[:3])
            raise UserError(
                f"{missing.size} of {len(query_groups)} queries have no relevant item in the gallery of "
                f"{len(gallery_groups)}: {named}{', ...' if missing.size > 3 else ''}; give each query's group an item"
            )
        indptr = np.concatenate([[0], np.cumsum(counts)])  # (Q+1,)
        return cls(indptr, order[np.repeat(first - indptr[:-1], counts) + np.arange(indptr[-1])])

    @property
    def counts(self) -> np.ndarray:
        """(Q,) how many items are relevant to each query."""
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """(nnz,) the query of each (query, relevant item) pair."""
        return np.repeat(np.arange(len(self.indptr) - 1), self.counts)


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the relevant items came, and what came first.

    Attributes:
      ranks: (nnz,) int64, 1-based, aligned with `Relevance.indices`; distinct within a query.
      top_scores: (Q, k) float32, descending, NaN last.
      top_items: (Q, k) int64 gallery items; equal scores by ascending index, relevant or not.
      nan_count: how many of the Q x G scores are NaN.
    """

    ranks: np.ndarray
    top_scores: np.ndarray
    top_items: np.ndarray
    nan_count: int


def ranks(
    queries,
    gallery,
    relevance: Relevance,
    *,
    top_k: int = 0,
    tile: int = 1024,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Ranks:
    """Returns the rank of each relevant item by dot product in float32, and each query's `top_k` items.

    A non-relevant item with an equal score ranks above a relevant one; relevant items with equal scores rank by index.
    A NaN score ranks below every other, and a relevant one below the non-relevant NaNs too. All scores come from one
    matrix product of one shape, so equal pairs of embeddings score equal to the last bit.

    Args:
      queries: (Q, D) embeddings, normalised by the caller if cosines are meant.
      gallery: (G, D) embeddings.
      relevance: the relevant items of the Q queries.
      top_k: k is the smaller of this and G.
      tile: queries and gallery items per tile; memory is about D * G + 3 * tile**2 floats.
      progress: wraps the sequence of query blocks, for a progress bar.

    Raises:
      ValueError: the shapes, or the relevance, do not belong together.
    """
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    _check(queries, gallery, relevance)
    tiles = -(-len(gallery) // tile)
    tiled = jnp.asarray(_pad(gallery, _bucket(tiles) * tile).reshape(-1, tile, gallery.shape[1]))  # (N, T, D)
    order = _block_order(relevance, tile)
    scores, at_or_above = np.empty(len(relevance.indices), np.float32), np.empty(len(relevance.indices), np.int64)
    top_shape = (len(queries), min(top_k, len(gallery)))
    top_scores, top_items = np.empty(top_shape, np.float32), np.empty(top_shape, np.int64)
    nan_count = -len(queries) * (tiles * tile - len(gallery))  # padding scores NaN

    for start in progress(range(0, len(queries), tile)):
        rows = order[start : start + tile]  # (B,)
        pairs, relevant = _relevant_of(rows, relevance)  # (P,), (B, R)
        schedule, gathering = _schedule(relevance.indices[pairs] // tile, tiles, 2 * len(tiled))
        block = _rank_block(
            _pad(queries[rows], tile),
            tiled,
            schedule,
            gathering,
            gathering + tiles,
            _pad(relevant, tile, fill=-1),
            np.int32(relevance.counts[rows].max()),
            np.int32(len(gallery)),
            top_k=top_shape[1],
        )
        block = [np.asarray(part)[: len(rows)] for part in block]
        scores[pairs], at_or_above[pairs] = block[0][relevant >= 0], block[1][relevant >= 0]
        nan_count += int(block[2].sum(dtype=np.int64))
        top_scores[rows], top_items[rows] = block[3], block[4]
    return Ranks(_from_counts(scores, at_or_above, relevance, len(gallery)), top_scores, top_items, nan_count)


@partial(jax.jit, static_argnames="top_k")
def _rank_block(queries, tiled, schedule, gathering, steps, relevant, width, size, *, top_k):
    """Returns, for one block of queries, (scores, at_or_above, nans, top_scores, top_items).

    The schedule visits first the tiles that hold relevant items, to gather their scores, then every tile, to count the
    scores at or above those. Both happen in one loop with one product in it: a second product, compiled apart, could
    add in another order and break ties in the last bit.

    Args:
      queries: (B, D). tiled: (N, T, D). schedule: (S,) tiles to visit. gathering: how many of them are for gathering.
      steps: how many there are. relevant: (B, R) items, -1 for none. width: relevant columns in use. size: G.
    """
    tile = tiled.shape[1]
    columns = jnp.arange(tile, dtype=jnp.int32)

    def gather(number, scores, carry):
        relevant_scores, *rest = carry
        local = relevant - number * tile
        found = jnp.take_along_axis(scores, jnp.clip(local, 0, tile - 1), axis=1)  # (B, R)
        return jnp.where((local >= 0) & (local < tile), found, relevant_scores), *rest

    def count(number, scores, carry):
        relevant_scores, at_or_above, nans, top = carry

        def column(j, at_or_above):
            threshold = lax.dynamic_slice_in_dim(relevant_scores, j, 1, axis=1)  # (B, 1)
            return at_or_above.at[:, j].add((scores >= threshold).sum(axis=1, dtype=jnp.int32))

        at_or_above = lax.fori_loop(0, width, column, at_or_above)
        nans += jnp.isnan(scores).sum(axis=1, dtype=jnp.int32)
        if top_k:
            top = _merge_top(top, scores, number * tile + columns, size)
        return relevant_scores, at_or_above, nans, top

    def visit(step, carry):
        number = schedule[step]
        scores = lax.dot_general(
            queries,
            tiled[number],
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # (B, T)
        scores = jnp.where(number * tile + columns < size, scores, jnp.nan)
        return lax.cond(step < gathering, gather, count, number, scores, carry)

    rows = len(queries)
    top = (jnp.full((rows, top_k), _EMPTY), jnp.full((rows, top_k), jnp.nan), jnp.full((rows, top_k), -1, jnp.int32))
    start = (jnp.full(relevant.shape, jnp.nan), jnp.zeros(relevant.shape, jnp.int32), jnp.zeros(rows, jnp.int32), top)
    relevant_scores, at_or_above, nans, top = lax.fori_loop(0, steps, visit, start)
    return relevant_scores, at_or_above, nans, top[1], top[2]


def _merge_top(top, scores, items, size):
    """Returns the best of `top` (three (B, k) arrays: keys, scores, items) and of one tile: score down, index up."""
    keys = jnp.where(jnp.isnan(scores), _NAN, jnp.maximum(scores, _MINUS_INFINITY))
    keys = jnp.where(items < size, keys, _EMPTY)  # (B, T)
    news = (keys, scores, jnp.broadcast_to(items, scores.shape))
    both = [jnp.concatenate(pair, axis=1) for pair in zip(top, news, strict=True)]  # (B, k + T) each
    # lax.top_k puts the lower position first among equals, and what is already in `top` has the lower indices.
    best, where = lax.top_k(both[0], top[0].shape[1])
    return best, *(jnp.take_along_axis(part, where, axis=1) for part in both[1:])


def _from_counts(scores, at_or_above, relevance, size):
    """Returns (nnz,) ranks: the counts include relevant items, which are put in their order here."""
    rows, nan = relevance.rows, np.isnan(scores)
    at_or_above = np.where(nan, size, at_or_above)
    order = np.lexsort((relevance.indices, -scores, nan, rows))  # (nnz,)
    score, row = scores[order], rows[order]
    tied = (row[1:] == row[:-1]) & ((score[1:] == score[:-1]) | (nan[order][1:] & nan[order][:-1]))
    ends = np.flatnonzero(np.append(~tied, True)) + 1  # where each run of equal scores of one query ends
    run = np.cumsum(np.append(0, ~tied))[: len(order)]
    relevant_at_or_above = ends[run] - relevance.indptr[row]
    position = np.arange(len(order)) - relevance.indptr[row]
    result = np.empty(len(order), np.int64)
    result[order] = at_or_above[order] - relevant_at_or_above + position + 1
    return result


def _block_order(relevance, tile):
    """Returns (Q,) the order to take queries in: like counts together, then neighbours by where their first item is.

    So a block is hardly wider than its queries need, and with one item per query few tiles are visited to gather.
    """
    width = np.ceil(np.log2(relevance.counts))
    return np.lexsort((relevance.indices[relevance.indptr[:-1]] // tile, width))


def _relevant_of(rows, relevance):
    """Returns (P,) the pairs of these queries and (B, R) their items, -1 for none, R a power of two."""
    counts = relevance.counts[rows]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (P,)
    pairs = np.repeat(relevance.indptr[rows], counts) + within
    relevant = np.full((len(rows), 1 << (int(counts.max()) - 1).bit_length()), -1, np.int32)
    relevant[np.repeat(np.arange(len(rows)), counts), within] = relevance.indices[pairs]
    return pairs, relevant


def _schedule(tiles_of_relevant, tiles, length):
    """Returns (length,) int32 tiles to visit, and how many of them come first to gather scores."""
    gather = np.unique(tiles_of_relevant)
    schedule = np.concatenate([gather, np.arange(tiles)])
    return np.resize(schedule, length).astype(np.int32), np.int32(len(gather))


def _bucket(tiles):
    """Returns the next of 1, 2, 3, 4, 6, 8, 12, ...: few distinct shapes, hence few compilations, for any gallery."""
    power = 1 << (tiles - 1).bit_length()
    return power * 3 // 4 if tiles <= power * 3 // 4 and power >= 4 else power


def _pad(array, length, fill=0):
    return np.pad(array, ((0, length - len(array)), (0, 0)), constant_values=fill)


def _check(queries, gallery, relevance):
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or not len(gallery):
        raise ValueError(f"embeddings (Q, D) and (G, D) expected, got {queries.shape} and {gallery.shape}")
    if len(relevance.indptr) != len(queries) + 1 or (relevance.indices >= len(gallery)).any():
        raise ValueError(f"the relevance is not of {len(queries)} queries and {len(gallery)} gallery items")
