"""The pages of an evaluation: its report, with the records' pictures, and the sheet of a gallery without captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.catalog.product import Product
from jaxclip.evaluation import report
from jaxclip.evaluation.results import Stored
from jaxclip.pipeline.records import Records

CHANGES, FAILED_CATEGORIES, FAILURES, LEAST_QUERIES = 6, 4, 2, 10


@dataclass(frozen=True)
class ProductPictures:
    """The ranked products and the records that hold their pictures.

    Attributes:
      products: (G,) in the order of the records.
      records: the split.
    """

    products: Sequence[Product]
    records: Records


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    found: Stored,
    gallery: ProductPictures,
    *,
    title: str,
    run: Mapping[str, str],
    curve: Sequence[Mapping],
    baseline: tuple[str, Stored, Mapping] | None = None,
) -> None:
    """Writes the report of the rankings `found` (see `report.report_page`).

    Args:
      gallery: the products that were ranked.
      baseline: the name, rankings and figures (`results.compare`) of another run on the same queries.
    """

    def row(stored: Stored, query: int) -> report.QueryRow:
        return _row(stored, query, gallery)

    comparison = None
    if baseline is not None:
        name, before, figures = baseline
        ratio = np.log(before.best_ranks / found.best_ranks)
        order = np.argsort(-ratio, kind="stable")

        def changes(chosen):
            return [report.Change(found.captions[q], row(before, q), row(found, q)) for q in chosen]

        improved = changes(q for q in order[:CHANGES] if ratio[q] > 0)
        worsened = changes(q for q in order[::-1][:CHANGES] if ratio[q] < 0)
        comparison = report.Comparison(name, figures, before.best_ranks, improved, worsened)
    page = report.report_page(
        metrics,
        title=title,
        run=run,
        queries=[row(found, query) for query in report.sample_queries(len(found.captions))],
        curve=curve,
        best_ranks=found.best_ranks,
        failures={
            category: [row(found, query) for query in queries]
            for category, queries in _failures(metrics, found, gallery.products).items()
        },
        comparison=comparison,
    )
    report.write(path, page)


def picture(number: int, gallery: ProductPictures, *, relevant: bool, score: float) -> report.Item:
    """Returns one product's picture as a page shows it."""
    encoded, mime = report.thumbnail(gallery.records.picture(number))
    return report.Item(encoded, mime, gallery.products[number].title, relevant, score)


def _failures(metrics, found, products) -> dict[str, list[int]]:
    """Returns, for the categories with the lowest hit@10, the queries whose answer came last."""
    categories = np.array([products[owner].category for owner in found.owners])
    named = [
        (row["hit@10"]["value"], name)
        for name, row in metrics["by_category"].items()
        if row["queries"] >= LEAST_QUERIES and row["hit@10"]["value"] < 1 and (categories == name).any()
    ]
    failures = {}
    for _, name in sorted(named)[:FAILED_CATEGORIES]:
        mine = np.flatnonzero((categories == name) & (found.best_ranks > 10))
        failures[name] = mine[np.argsort(-found.best_ranks[mine], kind="stable")][:FAILURES].tolist()
    return failures


def _row(found: Stored, query: int, gallery: ProductPictures) -> report.QueryRow:
    top = zip(found.top_items[query], found.top_relevant[query], found.top_scores[query], strict=True)
    items = [picture(int(n), gallery, relevant=bool(right), score=float(score)) for n, right, score in top]
    answer = None
    if not found.top_relevant[query].any():
        answer = picture(int(found.owners[query]), gallery, relevant=True, score=float("nan"))
    return report.QueryRow(str(found.captions[query]), int(found.best_ranks[query]), items, answer)
