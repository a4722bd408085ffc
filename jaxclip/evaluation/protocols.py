"""The protocol `groups`: the full gallery in both directions, by category, re-ranked, and trials of 100 products."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxclip.errors import UserError
from jaxclip.ranking import metrics, significance, trials
from jaxclip.ranking.candidates import Candidates, rank_changes
from jaxclip.ranking.ranks import Ranks, both_ways
from jaxclip.ranking.relevance import Relevance

UNCATEGORISED = "(none)"
CATEGORY_KS = (1, 5, 10)
BY_EMBEDDINGS = "are ranked by embeddings alone, and this evaluation is re-ranked"
"""Why a re-ranked evaluation lacks a protocol."""
TOP_K = 10  # largest number of best items that are stored per query


class GroupedEmbeddings:
    """The texts or the products of a split.

    Attributes:
      embeddings: (N, D) unit vectors, in float32: of texts, or of pictures.
      groups: (G,) the group of each text or product; a text and a product are relevant to each other if their groups
        are equal.
      owners: (N,) the product of each picture, ascending; None if each row is a text, or the only picture of a product.
    """

    def __init__(self, embeddings, groups: Sequence, owners: np.ndarray | None = None):
        self.embeddings, self.groups = np.asarray(embeddings, np.float32), np.asarray(groups)
        self.owners = None if owners is None or len(owners) == len(self.groups) else np.asarray(owners)

    @property
    def counts(self) -> np.ndarray:
        """(G,) the number of rows of each text or product."""
        return np.ones(len(self.groups), int) if self.owners is None else np.bincount(self.owners)

    def take(self, items: np.ndarray, counts: np.ndarray | None = None) -> "GroupedEmbeddings":
        """Returns these texts, or these products with all their pictures, in the given order.

        With `counts`, each has that many rows: one with fewer repeats its last, which changes no highest score.
        """
        if self.owners is None:
            return GroupedEmbeddings(self.embeddings[items], self.groups[items])
        own = self.counts
        starts, counts = np.cumsum(own) - own, own[items] if counts is None else counts
        owners = np.repeat(np.arange(len(items)), counts)
        within = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
        rows = starts[items][owners] + np.minimum(within, own[items][owners] - 1)
        return GroupedEmbeddings(self.embeddings[rows], self.groups[items], owners)

    @property
    def rows(self) -> int:
        """The number of rows that `embeddings` must have."""
        return len(self.groups) if self.owners is None else len(self.owners)


@dataclass(frozen=True, eq=False)
class Rankings:
    """The rankings of one direction, query by query.

    Attributes:
      best_ranks: (Q,) the rank of the first relevant item.
      relevant_counts: (Q,) the number of relevant items.
      values: metric -> (Q,) its value for each query; reported metrics are their means, and paired tests compare them.
      top_items: (Q, k) the first k items, best first; k is 10, or the size of a smaller gallery.
      top_scores: (Q, k) their scores.
      top_relevant: (Q, k) whether they are relevant.
    """

    best_ranks: np.ndarray
    relevant_counts: np.ndarray
    values: dict[str, np.ndarray]
    top_items: np.ndarray
    top_scores: np.ndarray
    top_relevant: np.ndarray


@dataclass(frozen=True, eq=False)
class Details:
    """The rankings behind the metrics.

    Attributes:
      text_to_image: the rankings of the images, one per text.
      image_to_text: the rankings of the texts, one per image.
      first_stage: the text-to-image rankings before re-ranking, None if nothing was re-ranked.
    """

    text_to_image: Rankings
    image_to_text: Rankings
    first_stage: Rankings | None = None


Result = tuple[dict[str, Any], Details]
"""The metrics of an evaluation and the rankings behind them."""


def evaluate(
    texts: GroupedEmbeddings,
    images: GroupedEmbeddings,
    categories_of_texts: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    trial_size: int = trials.SIZE,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    second_stage: Callable[[Candidates], np.ndarray] | None = None,
    candidates: int = 100,
) -> Result:
    """Returns (metrics, details): the figures of these protocols in metrics.json, and the rankings behind them.

    Every metric is `{"value", "low", "high"}` with a 95% bootstrap interval over queries (over trials, in "trials");
    counts and the hit@k of a random order ("chance") are plain numbers. In "text_to_image" the texts are the queries
    and all images are the gallery; in "image_to_text" it is the reverse. An item is relevant to a query if both have
    the same group.

    With a `second_stage`, "text_to_image" holds the figures after re-ranking and "first_stage" those before it.
    "reranked" holds the number of candidates "k", the share of texts with a relevant image among them ("retrieved", the
    first stage's hit@k, which no second stage can exceed), and the shares of texts whose rank improved, did not change
    or worsened.

    Args:
      texts: the Q texts.
      images: the G images.
      categories_of_texts: the category of each of the Q texts; "" is reported as "(none)".
      ks: the cut-offs of hit, recall, precision and nDCG; the figures by category always include 1, 5 and 10.
      trial_size: number of products in a trial.
      seed: seeds the trials and the bootstrap.
      progress: wraps the sequence of query blocks, for a progress bar.
      second_stage: candidates -> their new scores (Q, K), by which they are re-ordered.
      candidates: K, the number of candidates per text; used only with a second stage.

    Raises:
      UserError: a text or an image has no counterpart in its group.
      ValueError: the lengths differ.
    """
    if not len(texts.embeddings) == texts.rows == len(categories_of_texts) or len(images.embeddings) != images.rows:
        raise ValueError(
            f"{len(texts.embeddings)} texts with {len(texts.groups)} groups and {len(categories_of_texts)} categories, "
            f"{len(images.embeddings)} images with {len(images.groups)} groups"
        )
    relevance = Relevance.from_groups(texts.groups, images.groups)
    relevance_back = Relevance.from_groups(images.groups, texts.groups)
    depth = max(TOP_K, candidates) if second_stage else TOP_K
    ranks, ranks_back = both_ways(
        texts.embeddings, images.embeddings, relevance, owners=images.owners, top_k=depth, progress=progress
    )
    first_stage, retrieved = None, None
    if second_stage:
        retrieved = Candidates.among(ranks, relevance, texts.groups, images.groups, candidates)
        first_stage = _rankings(ranks, relevance, texts.groups, images.groups, ks)
        ranks = retrieved.reordered(second_stage(retrieved))
    details = Details(
        _rankings(ranks, relevance, texts.groups, images.groups, ks),
        _rankings(ranks_back, relevance_back, images.groups, texts.groups, ks),
        first_stage,
    )
    by_category = _by_category(details.text_to_image, categories_of_texts, relevance, ranks, ks, seed)
    trial_figures = (
        {"reason": f"trials {BY_EMBEDDINGS}"} if second_stage else _trials(texts, images, ks, trial_size, seed)
    )
    result = _metrics(details, by_category, trial_figures, ks, seed) | {"nan_scores": ranks.nan_count}
    if retrieved is not None:
        result |= _reranked(details, retrieved, seed)
    return result, details


def _metrics(details: Details, by_category, trial_figures, ks, seed) -> dict[str, Any]:
    queries, gallery = len(details.text_to_image.best_ranks), len(details.image_to_text.best_ranks)
    return {
        "text_to_image": _of(details.text_to_image, seed),
        "image_to_text": _of(details.image_to_text, seed),
        "by_category": by_category,
        "trials": trial_figures,
        "chance": chance(details.text_to_image.relevant_counts, gallery, ks),
        "chance_image_to_text": chance(details.image_to_text.relevant_counts, queries, ks),
        "queries": queries,
        "gallery": gallery,
    }


def _reranked(details: Details, retrieved: Candidates, seed: int) -> dict[str, Any]:
    """Returns the figures that a second stage adds."""
    changes = rank_changes(details.first_stage.best_ranks, details.text_to_image.best_ranks)
    shares = {"retrieved": retrieved.found, **changes}
    return {
        "first_stage": _of(details.first_stage, seed),
        "reranked": {"k": retrieved.items.shape[1], **means(shares, seed)},
    }


def _of(rankings: Rankings, seed: int) -> dict[str, dict[str, float]]:
    return figures(rankings.best_ranks, rankings.values, seed)


def _rankings(ranks: Ranks, relevance, query_groups, gallery_groups, ks) -> Rankings:
    """Returns the rankings of one direction."""
    top_items = ranks.top_items[:, :TOP_K]
    return Rankings(
        best_ranks=metrics.best_rank(ranks.ranks, relevance.indptr),
        relevant_counts=relevance.counts,
        values=metrics.per_query(ranks.ranks, relevance.indptr, ks),
        top_items=top_items,
        top_scores=ranks.top_scores[:, :TOP_K],
        top_relevant=gallery_groups[top_items] == query_groups[:, None],
    )


def figures(best_ranks: np.ndarray, values: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Returns the mean of every metric and the mean and median rank, with 95% intervals; hit@k comes first.

    Args:
      best_ranks: (Q,) the rank of the first relevant item of each query.
      values: metric -> (Q,) its value for each query, as `metrics.per_query` returns them.
      seed: seed of the bootstrap.
    """
    averages = means({**values, "mean_rank": best_ranks.astype(np.float64)}, seed)
    low, high = significance.bootstrap_interval(best_ranks, statistic=significance.median, seed=seed)
    median = {"median_rank": {"value": float(np.median(best_ranks)), "low": low, "high": high}}
    hits_and_mrr = {name: averages[name] for name in averages if name.startswith("hit@") or name == "mrr"}
    return hits_and_mrr | median | {"mean_rank": averages["mean_rank"]} | averages


def means(values: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Returns metric -> {"value", "low", "high"}: the mean of its (Q,) values and its 95% bootstrap interval.

    All metrics share the same resamples.
    """
    stacked = np.stack(list(values.values()))  # (M, Q)
    low, high = significance.bootstrap_interval(stacked, seed=seed)
    return {
        name: {"value": float(mean), "low": float(low[row]), "high": float(high[row])}
        for row, (name, mean) in enumerate(zip(values, stacked.mean(axis=1), strict=True))
    }


def differences(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], seed: int
) -> dict[str, dict[str, float]]:
    """Returns metric -> {"baseline", "value", "difference", "low", "high", "p"} of the metrics that both have.

    The difference is `after` minus `before`; "low" and "high" bound its 95% bootstrap interval over queries, and "p" is
    the p-value of the paired bootstrap test.

    Args:
      before, after: metric -> (Q,) its value for each of the same queries.
      seed: seed of the bootstrap.
    """
    names = [name for name in after if name in before]
    old, new = (np.stack([values[name] for name in names], dtype=np.float64) for values in (before, after))
    low, high = significance.bootstrap_interval(new - old, seed=seed)
    p_values = significance.paired_bootstrap(new, old, seed=seed)
    figures = zip(old.mean(1), new.mean(1), (new - old).mean(1), low, high, p_values, strict=True)
    keys = ("baseline", "value", "difference", "low", "high", "p")
    return {name: dict(zip(keys, map(float, row), strict=True)) for name, row in zip(names, figures, strict=True)}


def _by_category(rankings, categories, relevance, ranks, ks, seed):
    """Returns category -> number of queries, hit@k and MRR, ordered by number of queries, most first, then by name."""
    names, members = np.unique([name or UNCATEGORISED for name in categories], return_inverse=True)
    cut_offs = sorted({*CATEGORY_KS, *ks})
    values = {f"hit@{k}": metrics.hit(ranks.ranks, relevance.indptr, k) for k in cut_offs}
    values["mrr"] = rankings.values["mrr"]
    counts = np.bincount(members)
    rows = {}
    for row in np.lexsort((names, -counts)):
        category_values = {name: value[members == row] for name, value in values.items()}
        rows[str(names[row])] = {"queries": int(counts[row])} | means(category_values, seed)
    return rows


def _trials(texts: GroupedEmbeddings, images: GroupedEmbeddings, ks, size, seed):
    """Returns the mean hit@k and mAP over the trials, or the reason why there are no trials."""
    try:
        best_ranks = trials.best_ranks(
            texts.embeddings,
            images.embeddings,
            texts.groups,
            images.groups,
            owners=images.owners,
            size=size,
            seed=seed,
        )
    except UserError as error:
        return {"reason": str(error)}
    # A trial has one relevant item per query, so its average precision is the reciprocal of its rank.
    directions = [
        means({f"hit@{k}": (ranks <= k).mean(axis=1) for k in ks} | {"map": (1.0 / ranks).mean(axis=1)}, seed)
        for ranks in best_ranks
    ]
    return {"trials": trials.TRIALS, "products": size, "text_to_image": directions[0], "image_to_text": directions[1]}


def chance(relevant_counts: np.ndarray, gallery: int, ks: Sequence[int]) -> dict[str, float]:
    """Returns the expected hit@k of a random order of the gallery, for each k."""
    return {f"hit@{k}": metrics.chance_hit(relevant_counts, gallery, k) for k in ks}
