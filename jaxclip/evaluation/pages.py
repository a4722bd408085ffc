"""Writes the report of an evaluation, with pictures from the records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.catalog.product import Product
from jaxclip.evaluation import report
from jaxclip.evaluation.results import StoredRankings
from jaxclip.pipeline.records import Records

CHANGES, FAILED_CATEGORIES, FAILURES = 6, 4, 2
"""Upper limits: improved and worsened queries (each), categories with failures, and failures per category."""
MIN_QUERIES = 10  # a category with fewer queries is not shown among those with failures


@dataclass(frozen=True)
class ProductPictures:
    """The ranked products and the records that hold their pictures.

    Attributes:
      products: the G products, in the order of the records.
      records: the records of the split.
    """

    products: Sequence[Product]
    records: Records


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    rankings: StoredRankings,
    gallery: ProductPictures,
    *,
    title: str,
    run: Mapping[str, str],
    curve: Sequence[Mapping],
    baseline: tuple[str, StoredRankings, Mapping] | None = None,
) -> None:
    """Writes the report of an evaluation.

    Args:
      path: the HTML file.
      metrics: the content of metrics.json.
      rankings: the rankings behind the metrics.
      gallery: the products that were ranked.
      title: the heading.
      run: facts that identify and reproduce the run, as in `report.report_page`.
      curve: rows of the training log, as in `report.report_page`.
      baseline: name, rankings and comparison (`results.compare`) of another run, or of the first stage, on the same
        queries.
    """

    def row(stored: StoredRankings, query: int) -> report.QueryRow:
        return _row(stored, query, gallery)

    comparison = None
    if baseline is not None:
        name, before, figures = baseline
        gain = np.log(before.best_ranks / rankings.best_ranks)  # positive if the rank improved
        order = np.argsort(-gain, kind="stable")

        def changes(queries):
            return [report.Change(rankings.captions[q], row(before, q), row(rankings, q)) for q in queries]

        improved = changes(q for q in order[:CHANGES] if gain[q] > 0)
        worsened = changes(q for q in order[::-1][:CHANGES] if gain[q] < 0)
        comparison = report.Comparison(name, figures, before.best_ranks, improved, worsened)
    page = report.report_page(
        metrics,
        title=title,
        run=run,
        queries=[row(rankings, query) for query in report.sample_queries(len(rankings.captions))],
        curve=curve,
        best_ranks=rankings.best_ranks,
        failures={
            category: [row(rankings, query) for query in queries]
            for category, queries in _failures(metrics, rankings, gallery.products).items()
        },
        comparison=comparison,
    )
    report.write(path, page)


def picture(number: int, gallery: ProductPictures, *, relevant: bool, score: float) -> report.Item:
    """Returns the thumbnail of the product at index `number` of the gallery, as an item of a page."""
    encoded, mime = report.thumbnail(gallery.records.pictures(number)[0])
    return report.Item(encoded, mime, gallery.products[number].title, relevant, score)


def _failures(metrics, rankings, products) -> dict[str, list[int]]:
    """Returns category -> its queries with the worst ranks, for the categories with the lowest hit@10."""
    categories = np.array([products[owner].category for owner in rankings.owners])
    worst_categories = [
        (row["hit@10"]["value"], name)
        for name, row in metrics["by_category"].items()
        if row["queries"] >= MIN_QUERIES and row["hit@10"]["value"] < 1 and (categories == name).any()
    ]
    failures = {}
    for _, name in sorted(worst_categories)[:FAILED_CATEGORIES]:
        missed = np.flatnonzero((categories == name) & (rankings.best_ranks > 10))
        failures[name] = missed[np.argsort(-rankings.best_ranks[missed], kind="stable")][:FAILURES].tolist()
    return failures


def _row(rankings: StoredRankings, query: int, gallery: ProductPictures) -> report.QueryRow:
    """Returns a query with its first pictures, and with the picture of its product if none of them is relevant."""
    top = zip(rankings.top_items[query], rankings.top_relevant[query], rankings.top_scores[query], strict=True)
    items = [
        picture(int(number), gallery, relevant=bool(relevant), score=float(score)) for number, relevant, score in top
    ]
    answer = None
    if not rankings.top_relevant[query].any():
        answer = picture(int(rankings.owners[query]), gallery, relevant=True, score=float("nan"))
    return report.QueryRow(str(rankings.captions[query]), int(rankings.best_ranks[query]), items, answer)
