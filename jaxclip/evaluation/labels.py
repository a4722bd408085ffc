"""Labels (category, colour, season) as queries and as classes: what embeddings know without being trained for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.evaluation.protocols import means
from jaxclip.ranking import metrics, significance
from jaxclip.ranking.label_ranks import label_ranks
from jaxclip.ranking.relevance import Relevance

LEAST = 5  # products that a label needs to be counted
MOST_LABELS = 200  # beyond, a field is names or numbers rather than labels


@dataclass(frozen=True)
class Field:
    """One field of the catalogue with few values.

    Attributes:
      name: of the field, as "category" or "baseColour".
      labels: (L,) its values, at least two, sorted.
      members: (G,) the index of each product's label, -1 where it has none that counts.
    """

    name: str
    labels: Sequence[str]
    members: np.ndarray


def fields(values: Mapping[str, Sequence[str]]) -> list[Field]:
    """Returns the fields that hold labels: 2 to 200 values that 5 products or more share.

    `values` maps a field's name to the (G,) values of the products, "" where one has none.
    """
    found = []
    for name, of_products in values.items():
        labels, members, counts = np.unique(np.asarray(of_products, str), return_inverse=True, return_counts=True)
        kept = np.flatnonzero((counts >= LEAST) & (labels != ""))
        if 2 <= len(kept) <= MOST_LABELS:
            numbers = np.full(len(labels), -1)
            numbers[kept] = np.arange(len(kept))
            found.append(Field(name, [str(label) for label in labels[kept]], numbers[members]))
    return found


def ensemble(prompts: np.ndarray) -> np.ndarray:
    """Returns (L, D) unit vectors of (L, P, D) embeddings of P wordings each: their normalised mean (Radford et al.
    2021, Section 3.1.4)."""
    mean = np.asarray(prompts, np.float32).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def retrieve(field: Field, label_embeddings, images, *, seed: int = 0) -> dict:
    """Returns P@1, P@10, mAP, MRR and nDCG@10, means over labels: each searches all images for those that have it."""
    order = np.argsort(field.members, kind="stable")
    order = order[field.members[order] >= 0]
    counts = np.bincount(field.members[order], minlength=len(field.labels))
    relevance = Relevance(np.concatenate([[0], np.cumsum(counts)]), order)
    found = label_ranks(label_embeddings, images, relevance), relevance.indptr
    values = {
        "precision@1": metrics.precision(*found, 1),
        "precision@10": metrics.precision(*found, 10),
        "map": metrics.average_precision(*found),
        "mrr": metrics.reciprocal_rank(*found),
        "ndcg@10": metrics.ndcg(*found, 10),
    }
    return {"queries": len(field.labels), "gallery": len(images)} | means(values, seed)


def classify(field: Field, label_embeddings, images, *, seed: int = 0) -> dict:
    """Returns the accuracy and the F1 of naming each image's label, the nearest of the label embeddings.

    "weighted_f1" is the mean of the labels' F1 weighted by how many images have them, as FashionCLIP (Chia et al. 2022)
    reports it; "macro_f1" weighs labels alike. Images without a label that counts are left out.
    """
    known = field.members >= 0
    actual = field.members[known]
    scores = np.asarray(images, np.float32)[known] @ np.asarray(label_embeddings, np.float32).T
    predicted = scores.argmax(axis=1)
    result = means({"accuracy": (predicted == actual).astype(np.float64)}, seed)
    pair = np.stack([actual, predicted]).astype(np.float64)
    for name, weighted in (("weighted_f1", True), ("macro_f1", False)):
        (value,) = f1(pair, np.ones((1, len(actual))), len(field.labels), weighted=weighted)
        low, high = significance.bootstrap_interval(
            pair,
            statistic=lambda values, weights, w=weighted: f1(values, weights, len(field.labels), weighted=w)[None],
            samples=200,
            seed=seed,
        )
        result[name] = {"value": float(value), "low": float(low[0]), "high": float(high[0])}
    return {"labels": len(field.labels), "images": int(known.sum())} | result


def f1(pair: np.ndarray, weights: np.ndarray, labels: int, *, weighted: bool) -> np.ndarray:
    """Returns (S,) the mean F1 of (2, n) actual and predicted labels, each image taken as often as weights (S, n) say.

    A label's F1 is 2 tp / (actual + predicted), 0 where it is neither; the mean is over labels that occur.
    """
    actual, predicted = pair.astype(np.int64)
    hits = np.where(actual == predicted, actual, labels)

    def counted(numbers):
        return np.stack([np.bincount(numbers, weights=row, minlength=labels + 1)[:labels] for row in weights])

    support, named, right = counted(actual), counted(predicted), counted(hits)  # (S, L)
    each = 2 * right / np.maximum(support + named, 1e-12)
    share = support if weighted else ((support + named) > 0).astype(np.float64)
    return (each * share).sum(axis=1) / share.sum(axis=1)
