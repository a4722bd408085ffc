"""Zero-shot evaluation with product labels (category, colour, season): label retrieval and label classification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.evaluation.protocols import means
from jaxclip.ranking import metrics, significance
from jaxclip.ranking.label_ranks import label_ranks
from jaxclip.ranking.relevance import Relevance

MIN_PRODUCTS = 5  # values that fewer products have are not labels
MAX_LABELS = 200  # a field with more is taken for names or numbers and left out


@dataclass(frozen=True)
class Field:
    """A field of the catalogue whose values serve as labels.

    Attributes:
      name: the field's name, such as "category" or "baseColour".
      labels: the L labels, at least two, in alphabetical order.
      members: (G,) the index of each product's label, -1 for products without one of these labels.
    """

    name: str
    labels: Sequence[str]
    members: np.ndarray


def fields(values: Mapping[str, Sequence[str]]) -> list[Field]:
    """Returns the fields that have 2 to 200 labels; a label is a value shared by at least 5 products.

    `values` maps a field's name to its G values, one per product; "" means that the product has none.
    """
    label_fields = []
    for name, field_values in values.items():
        labels, members, counts = np.unique(np.asarray(field_values, str), return_inverse=True, return_counts=True)
        frequent = np.flatnonzero((counts >= MIN_PRODUCTS) & (labels != ""))
        if 2 <= len(frequent) <= MAX_LABELS:
            numbers = np.full(len(labels), -1)
            numbers[frequent] = np.arange(len(frequent))
            label_fields.append(Field(name, [str(label) for label in labels[frequent]], numbers[members]))
    return label_fields


def ensemble(prompts: np.ndarray) -> np.ndarray:
    """Returns (L, D) unit vectors, one per label: the normalised mean of its P prompt embeddings.

    `prompts` is (L, P, D). This is prompt ensembling (Radford et al. 2021, Section 3.1.4).
    """
    mean = np.asarray(prompts, np.float32).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def retrieve(field: Field, label_embeddings, images, *, owners=None, seed: int = 0) -> dict:
    """Returns P@1, P@10, mAP, MRR and nDCG@10, averaged over the labels, with intervals (see `protocols.means`).

    Each label is a query against all products, and the products with that label are relevant. The result also counts
    the labels ("queries") and the products ("gallery").

    Args:
      field: the L labels and the label of each product.
      label_embeddings: (L, D) unit vectors.
      images: (P, D) unit vectors of pictures.
      owners: (P,) the product of each picture, an index into `field.members`, ascending; None if each has one.
      seed: seeds the bootstrap.
    """
    order = np.argsort(field.members, kind="stable")
    order = order[field.members[order] >= 0]
    counts = np.bincount(field.members[order], minlength=len(field.labels))
    relevance = Relevance(np.concatenate([[0], np.cumsum(counts)]), order)
    ranks = label_ranks(label_embeddings, images, relevance, owners=owners)[0], relevance.indptr
    values = {
        "precision@1": metrics.precision(*ranks, 1),
        "precision@10": metrics.precision(*ranks, 10),
        "map": metrics.average_precision(*ranks),
        "mrr": metrics.reciprocal_rank(*ranks),
        "ndcg@10": metrics.ndcg(*ranks, 10),
    }
    return {"queries": len(field.labels), "gallery": len(field.members)} | means(values, seed)


def classify(field: Field, label_embeddings, images, *, owners=None, seed: int = 0) -> dict:
    """Returns the accuracy and F1 of zero-shot classification: each product gets the label with the highest score.

    The score of a product is the highest of its pictures'. "weighted_f1" averages the F1 of the labels, weighted by
    their numbers of products, as FashionCLIP reports it (Chia et al. 2022); "macro_f1" is the unweighted average.
    Products without one of the labels are left out ("products" counts the others). The arguments are the same as for
    `retrieve`.
    """
    known = field.members >= 0
    actual = field.members[known]
    scores = np.asarray(images, np.float32) @ np.asarray(label_embeddings, np.float32).T
    if owners is not None:
        scores = np.maximum.reduceat(scores, np.searchsorted(owners, np.arange(len(known))))
    predicted = scores[known].argmax(axis=1)
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
    return {"labels": len(field.labels), "products": int(known.sum())} | result


def f1(pair: np.ndarray, weights: np.ndarray, labels: int, *, weighted: bool) -> np.ndarray:
    """Returns (S,) the mean of the labels' F1 in each of S bootstrap samples.

    A label's F1 is 2 TP / (actual + predicted). Labels that are neither actual nor predicted are left out of the mean.

    Args:
      pair: (2, n) the actual and the predicted label of each of n products.
      weights: (S, n) how often each sample contains each product.
      labels: the number of labels.
      weighted: whether labels are weighted by their numbers of images.
    """
    actual, predicted = pair.astype(np.int64)
    hits = np.where(actual == predicted, actual, labels)

    def count(numbers):
        return np.stack([np.bincount(numbers, weights=row, minlength=labels + 1)[:labels] for row in weights])

    support, predictions, correct = count(actual), count(predicted), count(hits)  # (S, L)
    label_f1 = 2 * correct / np.maximum(support + predictions, 1e-12)
    weight = support if weighted else ((support + predictions) > 0).astype(np.float64)
    return (label_f1 * weight).sum(axis=1) / weight.sum(axis=1)
