"""Retrieval metrics per query, computed from the ranks of the relevant items, and the value expected by chance.

`ranks` is always (nnz,), one 1-based rank per relevant pair, distinct within a query; `indptr` (Q+1,) says where the
ranks of each of the Q queries start; and every query has at least one relevant item (see `ranks.Ranks` and
`relevance.Relevance`).
"""

from collections.abc import Sequence

import numpy as np


def best_rank(ranks: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Returns (Q,) the rank of each query's first relevant item, its lowest rank."""
    return np.minimum.reduceat(ranks, indptr[:-1])


def hit(ranks: np.ndarray, indptr: np.ndarray, k: int) -> np.ndarray:
    """Returns (Q,) 1.0 if any relevant item is in the top k, else 0.0; retrieval papers call the mean R@k."""
    return (best_rank(ranks, indptr) <= k).astype(np.float64)


def recall(ranks: np.ndarray, indptr: np.ndarray, k: int) -> np.ndarray:
    """Returns (Q,) |relevant in the top k| / |relevant|, as BEIR (Thakur et al. 2021) and trec_eval define it."""
    return _sums(ranks <= k, indptr) / np.diff(indptr)


def precision(ranks: np.ndarray, indptr: np.ndarray, k: int) -> np.ndarray:
    """Returns (Q,) |relevant in the top k| / k, even if there are fewer than k gallery items or relevant items."""
    return _sums(ranks <= k, indptr) / k


def reciprocal_rank(ranks: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Returns (Q,) 1 / rank of the first relevant item; its mean is MRR."""
    return 1.0 / best_rank(ranks, indptr)


def average_precision(ranks: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """Returns (Q,) the mean precision at the ranks of all relevant items, without a cut-off; its mean is mAP."""
    counts = np.diff(indptr)
    rows = np.repeat(np.arange(len(counts)), counts)
    ascending = ranks[np.lexsort((ranks, rows))]  # (nnz,)
    relevant_so_far = np.arange(len(ranks)) - np.repeat(indptr[:-1], counts) + 1
    return _sums(relevant_so_far / ascending, indptr) / counts


def ndcg(ranks: np.ndarray, indptr: np.ndarray, k: int) -> np.ndarray:
    """Returns (Q,) nDCG@k with binary gain: sum of 1 / log2(1 + rank) in the top k, divided by its ideal value."""
    gain = _sums(np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0), indptr)
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))  # (k,)
    return gain / ideal[np.minimum(np.diff(indptr), k) - 1]


def per_query(ranks: np.ndarray, indptr: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, np.ndarray]:
    """Returns metric -> its (Q,) values: mrr and map, and for each of `ks` hit@k, ndcg@k, recall@k and precision@k."""
    at_k = {"hit": hit, "ndcg": ndcg, "recall": recall, "precision": precision}
    values = {f"{name}@{k}": metric(ranks, indptr, k) for name, metric in at_k.items() for k in ks}
    hits = {name: values.pop(name) for name in [f"hit@{k}" for k in ks]}
    without_k = {"mrr": reciprocal_rank(ranks, indptr), "map": average_precision(ranks, indptr)}
    return hits | without_k | values


def chance_hit(relevant_counts: np.ndarray, gallery: int, k: int) -> float:
    """Returns the expected hit@k of a random order: the mean over queries of 1 - C(G-R, k) / C(G, k), not sampled.

    C(n, k) is the binomial coefficient.

    Args:
      relevant_counts: (Q,) R, the number of relevant items of each query.
      gallery: G, the number of gallery items.
      k: at least 1.

    Raises:
      ValueError: there is no count, or a count is outside 1..G.
    """
    counts, weights = np.unique(np.asarray(relevant_counts), return_counts=True)  # (U,)
    if not counts.size or counts[0] < 1 or counts[-1] > gallery:
        raise ValueError(f"relevant counts must lie in 1..{gallery}, got {counts[:1]} to {counts[-1:]}")
    drawn = np.arange(min(k, gallery))
    share = counts[:, None] / (gallery - drawn)  # (U, k) chance that the next item is relevant if all before it are not
    with np.errstate(divide="ignore"):
        log_miss = np.log1p(-np.minimum(share, 1.0)).sum(axis=1)
    return float(np.average(-np.expm1(log_miss), weights=weights))


def hit_ceiling(texts, items, k: int) -> float:
    """Returns the highest mean hit@k of queries that ask for one item each, if equal texts are asked for several items.

    Queries with the same text have the same embedding and so the same top k, in which at most k of their items are.
    The best ranking of a text therefore has the k items first that most of its queries ask for, and the ceiling is the
    number of queries that this answers, divided by Q. Items with equal pictures, which tie, can lower it further.

    Args:
      texts: (Q,) the text of each query, a number or name that is equal for equal texts.
      items: (Q,) the item that each query asks for.
      k: at least 1.

    Raises:
      ValueError: there are no queries, or the lengths differ.
    """
    texts, items = np.asarray(texts), np.asarray(items)
    if texts.ndim != 1 or texts.shape != items.shape or not texts.size:
        raise ValueError(f"a text and an item for each of Q > 0 queries expected, got {texts.shape} and {items.shape}")
    text = np.unique(texts, return_inverse=True)[1]
    item = np.unique(items, return_inverse=True)[1]
    pairs, queries = np.unique(np.stack([text, item]), axis=1, return_counts=True)  # sorted by text
    queries = queries[np.lexsort((-queries, pairs[0]))]
    place = np.arange(len(queries)) - np.searchsorted(pairs[0], pairs[0])
    return float(queries[place < k].sum() / len(texts))


def item_hit_ceiling(texts, items, k: int) -> float:
    """Returns the highest mean hit@k of items that ask for their own texts, if equal texts belong to several items.

    Equal texts have equal scores, and ties are pessimistic: a text ranks below all equal texts of other items. An item
    can therefore have a text in the top k only if fewer than k texts of others equal one of its texts.

    Args:
      texts: (Q,) the text of each caption, a number or name that is equal for equal texts.
      items: (Q,) the item of each caption; every item that occurs asks once.
      k: at least 1.
    """
    text = np.unique(np.asarray(texts), return_inverse=True)[1]
    item = np.unique(np.asarray(items), return_inverse=True)[1]
    _, back, own = np.unique(np.stack([text, item]), axis=1, return_inverse=True, return_counts=True)
    others = np.bincount(text)[text] - own[back.reshape(-1)]
    fewest = np.full(item.max() + 1, len(text))
    np.minimum.at(fewest, item, others)
    return float((fewest < k).mean())


def _sums(values, indptr):
    """Returns (Q,) the sum of each query's values (nnz,)."""
    return np.add.reduceat(values.astype(np.float64), indptr[:-1])
