"""The evaluation protocols: the full gallery in both directions, by category, re-ranked, and 100-image trials."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.errors import UserError
from jaxclip.ranking import metrics, significance, trials
from jaxclip.ranking.candidates import Candidates, moved
from jaxclip.ranking.ranks import Ranks, both_ways
from jaxclip.ranking.relevance import Relevance

UNCATEGORISED = "(none)"
CATEGORY_KS = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class Rankings:
    """What one direction found, query by query.

    Attributes:
      best_ranks: (Q,) rank of the first relevant item.
      relevant_counts: (Q,) how many items are relevant.
      values: the (Q,) values behind each figure, under the figure's name, for paired comparison of two runs.
      top_items: (Q, k) items, best first. top_scores: (Q, k). top_relevant: (Q, k) whether they are right.
    """

    best_ranks: np.ndarray
    relevant_counts: np.ndarray
    values: dict[str, np.ndarray]
    top_items: np.ndarray
    top_scores: np.ndarray
    top_relevant: np.ndarray


@dataclass(frozen=True, eq=False)
class Details:
    """The rankings behind the metrics, in both directions; where they were re-ranked also those of the first stage."""

    text_to_image: Rankings
    image_to_text: Rankings
    first_stage: Rankings | None = None


def evaluate(
    text_embeddings,
    image_embeddings,
    text_groups: Sequence,
    image_groups: Sequence,
    categories_of_texts: Sequence[str],
    *,
    ks: Sequence[int] = (1, 5, 10),
    top_k: int = 10,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    second_stage: Callable[[Candidates], np.ndarray] | None = None,
    candidates: int = 100,
) -> tuple[dict, Details]:
    """Returns (metrics, details): the content of metrics.json but for the run's fingerprints, and what is behind it.

    Every figure is `{"value", "low", "high"}` with a 95% bootstrap interval over queries (over trials, in `trials`).
    Text-to-image queries are texts and its gallery all images, image-to-text the reverse; relevant means same group.

    With a `second_stage`, text-to-image is what it makes of the images that the embeddings retrieve, and what they make
    of the texts themselves is under "first_stage". "reranked" then has k, the share of texts to which an answer was
    retrieved (their hit@k: what no second stage can exceed) and the shares that it improved and worsened.

    Args:
      text_embeddings: (Q, D), normalised. image_embeddings: (G, D), normalised.
      text_groups: (Q,) the group of each text. image_groups: (G,) of each image.
      categories_of_texts: (Q,) names; "" is shown as "(none)".
      ks: depths of hit, recall, precision and nDCG; rows of categories have 1, 5 and 10 too.
      top_k: how many items per query the details keep.
      seed: of the trials and of the resampling.
      progress: wraps the sequence of query blocks.
      second_stage: scores (Q, K) of the candidates, which alone are re-ordered.
      candidates: K.

    Raises:
      UserError: a text or an image has no counterpart of its group.
      ValueError: the lengths differ.
    """
    texts, images = np.asarray(text_embeddings, np.float32), np.asarray(image_embeddings, np.float32)
    text_groups, image_groups = np.asarray(text_groups), np.asarray(image_groups)
    if not len(texts) == len(text_groups) == len(categories_of_texts) or len(images) != len(image_groups):
        raise ValueError(
            f"{len(texts)} texts with {len(text_groups)} groups and {len(categories_of_texts)} categories, "
            f"{len(images)} images with {len(image_groups)} groups"
        )
    relevance = Relevance.from_groups(text_groups, image_groups), Relevance.from_groups(image_groups, text_groups)
    deep = max(top_k, candidates) if second_stage else top_k
    found, found_back = both_ways(texts, images, relevance[0], top_k=deep, progress=progress)
    first, retrieved = None, None
    if second_stage:
        retrieved = Candidates.among(found, relevance[0], text_groups, image_groups, candidates)
        first = _rankings(found, relevance[0], text_groups, image_groups, ks, top_k)
        found = retrieved.reordered(second_stage(retrieved))
    details = Details(
        _rankings(found, relevance[0], text_groups, image_groups, ks, top_k),
        _rankings(found_back, relevance[1], image_groups, text_groups, ks, top_k),
        first,
    )
    result = {
        "text_to_image": _figures(details.text_to_image, seed),
        "image_to_text": _figures(details.image_to_text, seed),
        "by_category": _by_category(details.text_to_image, categories_of_texts, relevance[0], found, ks, seed),
        "trials": {"reason": "trials are of embeddings alone, which is the first stage"}
        if second_stage
        else _trials(texts, images, text_groups, image_groups, ks, seed),
        "chance": _chance(details.text_to_image, len(images), ks),
        "chance_image_to_text": _chance(details.image_to_text, len(texts), ks),
        "queries": len(texts),
        "gallery": len(images),
        "nan_scores": found.nan_count,
    }
    if first is not None:
        result["first_stage"] = _figures(first, seed)
        shares = {"retrieved": retrieved.found, **moved(first.best_ranks, details.text_to_image.best_ranks)}
        result["reranked"] = {"k": retrieved.items.shape[1], **means(shares, seed)}
    return result, details


def _rankings(found: Ranks, relevance, query_groups, gallery_groups, ks, top_k):
    """Returns one direction's rankings, by query."""
    top_items = found.top_items[:, :top_k]
    return Rankings(
        best_ranks=metrics.best_rank(found.ranks, relevance.indptr),
        relevant_counts=relevance.counts,
        values=metrics.per_query(found.ranks, relevance.indptr, ks),
        top_items=top_items,
        top_scores=found.top_scores[:, :top_k],
        top_relevant=gallery_groups[top_items] == query_groups[:, None],
    )


def _figures(rankings, seed):
    """Returns every mean, and the median rank, with intervals; the hits first."""
    figures = means(rankings.values | {"mean_rank": rankings.best_ranks.astype(np.float64)}, seed)
    low, high = significance.bootstrap_interval(rankings.best_ranks, statistic=significance.median, seed=seed)
    median = {"median_rank": {"value": float(np.median(rankings.best_ranks)), "low": low, "high": high}}
    first = {name: figures[name] for name in figures if name.startswith("hit@") or name == "mrr"}
    return first | median | {"mean_rank": figures["mean_rank"]} | figures


def means(values: Mapping[str, np.ndarray], seed: int) -> dict[str, dict[str, float]]:
    """Returns {"value", "low", "high"} of the mean of each of the named (Q,) values, all on the same resamples."""
    stacked = np.stack(list(values.values()))  # (M, Q)
    low, high = significance.bootstrap_interval(stacked, seed=seed)
    return {
        name: {"value": float(mean), "low": float(low[row]), "high": float(high[row])}
        for row, (name, mean) in enumerate(zip(values, stacked.mean(axis=1), strict=True))
    }


def _by_category(rankings, categories, relevance, found, ks, seed):
    """Returns a row per category, most queries first, then by name."""
    names, members = np.unique([name or UNCATEGORISED for name in categories], return_inverse=True)
    depths = sorted({*CATEGORY_KS, *ks})
    values = {f"hit@{k}": metrics.hit(found.ranks, relevance.indptr, k) for k in depths}
    values["mrr"] = rankings.values["mrr"]
    counts = np.bincount(members)
    rows = {}
    for row in np.lexsort((names, -counts)):
        of_category = {name: value[members == row] for name, value in values.items()}
        rows[str(names[row])] = {"queries": int(counts[row])} | means(of_category, seed)
    return rows


def _trials(texts, images, text_groups, image_groups, ks, seed):
    """Returns the mean hit@k and mAP over the trials, or the reason why there are none."""
    try:
        best = trials.best_ranks(texts, images, text_groups, image_groups, seed=seed)
    except UserError as error:
        return {"reason": str(error)}
    # One right item each: its average precision is the reciprocal of its rank.
    figures = [
        means({f"hit@{k}": (side <= k).mean(axis=1) for k in ks} | {"map": (1.0 / side).mean(axis=1)}, seed)
        for side in best
    ]
    return {"trials": trials.TRIALS, "images": trials.SIZE, "text_to_image": figures[0], "image_to_text": figures[1]}


def _chance(rankings, gallery, ks):
    return {f"hit@{k}": metrics.chance_hit(rankings.relevant_counts, gallery, k) for k in ks}
