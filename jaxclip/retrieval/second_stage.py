"""The `rerank` protocol: the first stage's top K in a new order, everything else where the first stage left it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.retrieval import metrics, significance
from jaxclip.retrieval.ranks import Ranks, Relevance, ranks

COMPARED = ("hit@1", "hit@5", "hit@10", "mrr")


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the first stage retrieved: nothing but its own top K, whether or not an answer is among them.

    Attributes:
      items: (Q, K) gallery items, best first. scores: (Q, K) of the first stage.
      relevant: (Q, K) whether they are right.
      first: the ranks behind them. relevance: of all items.
    """

    items: np.ndarray
    scores: np.ndarray
    relevant: np.ndarray
    first: Ranks
    relevance: Relevance

    @property
    def found(self) -> np.ndarray:
        """(Q,) whether any candidate is right."""
        return self.relevant.any(axis=1)


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
    found = ranks(queries, gallery, relevance, top_k=k)
    relevant = gallery_groups[found.top_items] == query_groups[:, None]
    return Candidates(found.top_items, found.top_scores, relevant, found, relevance)


def reordered(candidates: Candidates, scores: np.ndarray) -> np.ndarray:
    """Returns (nnz,) ranks aligned with `relevance.indices` after the candidates are ordered by new scores (Q, K).

    An item that the first stage did not retrieve keeps its rank, which is past K. Ties are pessimistic, as in `ranks`:
    a non-relevant candidate with an equal score comes before a relevant one, relevant ones keep their order; NaN comes
    last.

    Raises:
      ValueError: the scores are not (Q, K).
    """
    if scores.shape != candidates.items.shape:
        raise ValueError(f"scores {candidates.items.shape} expected, got {scores.shape}")
    keys = np.where(np.isnan(scores), -np.inf, scores)
    order = np.lexsort((candidates.relevant, -keys), axis=1)  # (Q, K)
    position = np.empty_like(order)
    np.put_along_axis(position, order, np.arange(1, order.shape[1] + 1)[None], axis=1)
    relevance, result = candidates.relevance, candidates.first.ranks.copy()
    queries, columns = np.nonzero(candidates.relevant)
    # Items ascend within a query: one sorted key for (query, item) finds each candidate's place in `indices`.
    size = int(max(relevance.indices.max(), candidates.items.max())) + 1
    place = np.searchsorted(
        relevance.rows * size + relevance.indices, queries * size + candidates.items[queries, columns]
    )
    result[place] = position[queries, columns]
    return result


def order(candidates: Candidates, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (Q, K) items and whether they are right, best first by new scores; ties in the first stage's order."""
    keys = np.where(np.isnan(scores), -np.inf, scores)
    by_score = np.argsort(-keys, axis=1, kind="stable")
    return tuple(np.take_along_axis(a, by_score, axis=1) for a in (candidates.items, candidates.relevant))


def evaluate(
    candidates: Candidates,
    scores: np.ndarray,
    categories: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    uncategorised: str = "(none)",
) -> tuple[dict, dict[str, dict[str, np.ndarray]]]:
    """Returns (metrics, per query): the second stage beside the first on the same queries and the whole gallery.

    The metrics are `first_stage` and `text_to_image` (after re-ranking): figures as `protocols.evaluate` gives them;
    `by_category` after re-ranking; and `reranked`: k, the share of queries whose answer is among the candidates
    (`retrieved`, hit@K of the first stage: what no second stage can exceed), the shares improved, unchanged and
    worsened in the rank of the first right item, and for hits and MRR the difference with its paired-bootstrap p-value.
    Per query are, for both stages, the (Q,) values of every figure and `best_rank`.

    Args:
      candidates: of the first stage.
      scores: (Q, K) of the second.
      categories: (Q,) names of categories.
      ks: depths; figures are given for those up to the number of candidates.
      seed: of the resampling.
      uncategorised: stands for "".
    """
    indptr, ks = candidates.relevance.indptr, [k for k in ks if k <= candidates.items.shape[1]]
    per_query = {}
    for stage, found in (("first_stage", candidates.first.ranks), ("text_to_image", reordered(candidates, scores))):
        per_query[stage] = metrics.per_query(found, indptr, ks) | {"best_rank": metrics.best_rank(found, indptr)}
    before, after = per_query["first_stage"], per_query["text_to_image"]
    moved = np.sign(before["best_rank"] - after["best_rank"])
    compared = {
        name: {
            "difference": float((after[name] - before[name]).mean()),
            "p": significance.paired_bootstrap(after[name], before[name], seed=seed),
        }
        for name in COMPARED
        if name in after
    }
    result = {stage: _figures(values, seed) for stage, values in per_query.items()}
    result["by_category"] = _by_category(after, [name or uncategorised for name in categories], seed)
    result["reranked"] = {
        "k": candidates.items.shape[1],
        "retrieved": float(candidates.found.mean()),
        "improved": float((moved > 0).mean()),
        "unchanged": float((moved == 0).mean()),
        "worsened": float((moved < 0).mean()),
        "compared": compared,
    }
    return result, per_query


def table(metrics: Mapping, name: str = "second stage") -> str:
    """Returns the headline figures of both stages as lines for the terminal, beside chance where it is given."""
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for title, stage in (("first stage", "first_stage"), (name, "text_to_image")):
        figures = [metrics[stage][hit] for hit in names]
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
        lines.append(f"{title:16}" + "".join(f"{cell:>24}" for cell in cells))
    seen = metrics["reranked"]
    cells = [f"{seen['compared'][hit]['difference']:+.3f}, p {seen['compared'][hit]['p']:.4f}" for hit in names]
    lines.append(f"{'difference':16}" + "".join(f"{cell:>24}" for cell in cells))
    if "chance" in metrics:
        lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][hit]:>24.4f}" for hit in names))
    lines.append(
        f"queries {seen['improved']:.1%} improved, {seen['unchanged']:.1%} unchanged, {seen['worsened']:.1%} worsened; "
        f"the top {seen['k']} hold an answer to {seen['retrieved']:.1%}"
    )
    return "\n".join(lines)


def _figures(values: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    means = {name: value for name, value in values.items() if name != "best_rank"}
    low, high = significance.bootstrap_interval(np.stack(list(means.values())), seed=seed)
    figures = {
        name: {"value": float(value.mean()), "low": float(low[row]), "high": float(high[row])}
        for row, (name, value) in enumerate(means.items())
    }
    low, high = significance.bootstrap_interval(values["best_rank"], statistic=significance.median, seed=seed)
    return figures | {"median_rank": {"value": float(np.median(values["best_rank"])), "low": low, "high": high}}


def _by_category(values: Mapping[str, np.ndarray], categories: Sequence[str], seed: int) -> dict[str, dict]:
    names, members = np.unique(list(categories), return_inverse=True)
    counts = np.bincount(members)
    shown = {name: value for name, value in values.items() if name.startswith("hit@") or name == "mrr"}
    rows = {}
    for row in np.lexsort((names, -counts)):
        low, high = significance.bootstrap_interval(
            np.stack([value[members == row] for value in shown.values()]), seed=seed
        )
        rows[str(names[row])] = {"queries": int(counts[row])} | {
            name: {"value": float(value[members == row].mean()), "low": float(low[i]), "high": float(high[i])}
            for i, (name, value) in enumerate(shown.items())
        }
    return rows
