"""The result files of an evaluation: metrics.json, its figures as CSV tables, and metrics and best items per query."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.errors import UserError
from jaxclip.evaluation.protocols import Details, differences
from jaxclip.evaluation.rows import DIRECTIONS
from jaxclip.evaluation.rows import rows as figure_rows
from jaxclip.runtime import files

QUERIES = "queries.npz"
FIRST_STAGE = "first_stage"
"""Subfolder of a re-ranked evaluation that holds the first stage's queries.npz and queries.csv."""
CSV_HEADER = (
    *("protocol", "direction", "stage", "catalogue", "queries", "gallery", "metric"),
    *("value", "low", "high", "chance", "ceiling"),
)
_ARRAYS = ("best_ranks", "top_items", "top_relevant", "top_scores")


@dataclass(frozen=True, eq=False)
class StoredRankings:
    """The text-to-image rankings of an evaluation, and its metrics per query, as stored in queries.npz.

    Attributes:
      data_fingerprint: the fingerprint of the prepared dataset.
      captions: (Q,) the texts.
      owners: (Q,) the index of each text's product.
      ids: (G,) the ids of the products.
      best_ranks: (Q,) the rank of the first relevant item.
      top_items: (Q, k) the first k items, best first; k is 10, or the size of a smaller gallery.
      top_relevant: (Q, k) whether they are relevant.
      top_scores: (Q, k) their scores.
      values: direction -> metric -> (Q,) or (G,) its value for every query of that direction.
    """

    data_fingerprint: str
    captions: np.ndarray
    owners: np.ndarray
    ids: np.ndarray
    best_ranks: np.ndarray
    top_items: np.ndarray
    top_relevant: np.ndarray
    top_scores: np.ndarray
    values: dict[str, dict[str, np.ndarray]]


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Writes metrics.json, metrics.csv and by_category.csv; each file is replaced atomically.

    metrics.csv has a line for each metric of each row of `evaluation.rows`, and by_category.csv has the figures from
    text to image by `groups`.
    """
    _write(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    lines = [
        (row.protocol, row.direction, row.stage, row.source, row.queries or "", row.gallery or "", name)
        + tuple(figure.get(key, "") for key in ("value", "low", "high"))
        + (row.chance.get(name, ""), row.ceiling.get(name, ""))
        for row in figure_rows(metrics)
        for name, figure in row.figures.items()
    ]
    _write(folder / "metrics.csv", _table(CSV_HEADER, lines))
    rows = [
        (category, row["queries"], name, figure["value"], figure["low"], figure["high"])
        for category, row in metrics["by_category"].items()
        for name, figure in row.items()
        if name != "queries"
    ]
    _write(folder / "by_category.csv", _table(("category", "queries", "metric", "value", "low", "high"), rows))


def write_queries(
    folder: Path, details: Details, *, captions: Sequence[str], owners, ids: Sequence[str], data_fingerprint: str
) -> None:
    """Writes queries.npz, which comparisons read, and queries.csv, a table with one row per text.

    Args:
      details: the rankings.
      captions: the Q texts.
      owners: (Q,) the index of each text's product.
      ids: the ids of the G products.
      data_fingerprint: the fingerprint of the prepared dataset.
    """
    rankings = details.text_to_image
    values = {
        f"{direction}/{name}": query_values
        for direction in DIRECTIONS
        for name, query_values in getattr(details, direction).values.items()
    }
    file = io.BytesIO()
    np.savez_compressed(
        file,
        data_fingerprint=np.asarray(data_fingerprint),
        captions=np.asarray(captions, str),
        owners=np.asarray(owners),
        ids=np.asarray(ids, str),
        **{name: getattr(rankings, name) for name in _ARRAYS},
        **values,
    )
    _write(folder / QUERIES, file.getvalue())
    rows = (
        (caption, ids[owner], rank, ids[top[0]])
        for caption, owner, rank, top in zip(captions, owners, rankings.best_ranks, rankings.top_items, strict=True)
    )
    _write(folder / "queries.csv", _table(("text", "product", "rank", "found first"), rows))


def read_queries(folder: Path) -> StoredRankings:
    """Returns the rankings stored in an evaluation's folder; raises UserError if there are none."""
    path = folder / QUERIES
    if not path.exists():
        raise UserError(f"{path} is missing: evaluate the run of this folder first")
    with np.load(path, allow_pickle=False) as file:
        values = {
            direction: {name.partition("/")[2]: file[name] for name in file.files if name.startswith(direction + "/")}
            for direction in DIRECTIONS
        }
        return StoredRankings(
            str(file["data_fingerprint"]),
            *(file[name] for name in ("captions", "owners", "ids", *_ARRAYS)),
            values=values,
        )


def compare(
    baseline: StoredRankings, other: StoredRankings, *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Returns direction -> the `protocols.differences` of `other` to `baseline`, by the protocol `groups`.

    Raises:
      UserError: the two evaluations differ in their products or queries.
    """
    are_equal = (np.array_equal(getattr(baseline, name), getattr(other, name)) for name in ("owners", "ids"))
    if baseline.data_fingerprint != other.data_fingerprint or not all(are_equal):
        raise UserError(
            f"the two evaluations rank different products (data fingerprints {baseline.data_fingerprint} and "
            f"{other.data_fingerprint}): evaluate both on the same catalogue and split"
        )
    return {
        direction: differences(baseline.values[direction], other.values[direction], seed) for direction in DIRECTIONS
    }


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    """Returns the rows as CSV, floats with six significant digits."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return file.getvalue().encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomically(path) as temporary:
        temporary.write_bytes(content)
