"""The protocol `judged`: queries and graded products from a file (data.queries)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.catalog.judgements import Judgements, read
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.evaluation.protocols import GroupedEmbeddings, means
from jaxclip.ranking import graded
from jaxclip.ranking.label_ranks import label_ranks
from jaxclip.ranking.relevance import Relevance


@dataclass(frozen=True, eq=False)
class JudgedSplit:
    """The judged queries of a split, and their judged products among the G products of a gallery.

    Attributes:
      texts: the Q queries that have a judged product in the gallery, as typed.
      relevance: the judged products of each query, whatever their grade.
      grades: (nnz,) the grade of each.
      unjudged: number of queries of the split without a judged product in the gallery.
      missing: number of judgements of products that are not in the gallery.
      notes: what was found wrong in the file.
    """

    texts: list[str]
    relevance: Relevance
    grades: np.ndarray
    unjudged: int
    missing: int
    notes: list[str] = field(default_factory=list)


def find(config: Config, ids: Sequence[str]) -> JudgedSplit | None:
    """Returns the judged queries of the configured split; None if data.queries is not set or is only trained on.

    Queries for which the file names no split belong to validation and to test (`Judgements.of_split`).

    Raises:
      UserError: the file cannot be read, or judges no product of the gallery.
    """
    if not config.data.queries:
        return None
    path, split = Path(config.data.queries).expanduser(), config.data.split
    judgements = read(path)
    if config.augmentation.queries and not judgements.has_split(split):
        return None  # `find_judged_queries` says so
    judgements = judgements.of_split(split)
    found = judged_queries(judgements, ids)
    if not found.texts:
        raise UserError(
            f"{path} judges none of the {len(ids):,} products of the split {split}, whose ids are like "
            f"{', '.join(ids[:3])}; it names {', '.join(judgements.product_ids[:3])}: its ids must be the catalogue's"
        )
    return replace(found, notes=[f"{path.name}: {count:,} {kind}" for kind, count in judgements.oddities.items()])


def judged_queries(judgements: Judgements, ids: Sequence[str]) -> JudgedSplit:
    """Returns the queries with their judged products in a gallery, given its ids in order."""
    aligned = judgements.of(ids)
    used, rows = np.unique(aligned.queries, return_inverse=True)
    relevance = Relevance(np.searchsorted(rows, np.arange(len(used) + 1)), aligned.items.astype(np.int64))
    texts = [judgements.texts[number] for number in used]
    return JudgedSplit(texts, relevance, aligned.grades, len(judgements.texts) - len(used), aligned.missing_judgements)


def evaluate(
    queries: JudgedSplit, embeddings: np.ndarray, products: GroupedEmbeddings, *, ks: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Returns the mean of each graded metric (`graded.per_query`) with its interval, and counts.

    Only queries with an answer in the gallery, a product of a grade above 0, are averaged: "queries". The others are
    counted as "without_answer", and those without any judged product in the gallery as "unjudged". "judgements" counts
    those of products in the gallery, and "missing" the others, which are left out.

    Args:
      queries: the Q queries.
      embeddings: (Q, D) unit vectors of the queries.
      products: the G products.
      ks: the cut-offs.
      seed: seed of the bootstrap.
    """
    ranks, scores = label_ranks(embeddings, products.embeddings, queries.relevance, owners=products.owners)
    judged = graded.Judged(queries.relevance.indptr, queries.grades, ranks).pessimistic(scores)
    answered = graded.answered(judged)
    counts = {
        "queries": int(answered.sum()),
        "without_answer": int((~answered).sum()),
        "unjudged": queries.unjudged,
        "judgements": len(queries.grades),
        "missing": queries.missing,
        "gallery": len(products.groups),
    }
    if not answered.any():
        return {"reason": "no query has an answer in the gallery", **counts}
    values = {name: value[answered] for name, value in graded.per_query(judged, ks).items()}
    return means(values, seed) | counts
