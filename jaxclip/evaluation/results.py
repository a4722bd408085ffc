"""What an evaluation leaves in its folder beside the report: metrics.json, the same as tables, each query's figures."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.errors import UserError
from jaxclip.evaluation.protocols import Details
from jaxclip.ranking import significance
from jaxclip.runtime import files

QUERIES = "queries.npz"
FIRST_STAGE = "first_stage"
"""Folder in that of a re-ranked evaluation, of the queries.npz before re-ranking."""
DIRECTIONS = ("text_to_image", "image_to_text")
_ARRAYS = ("best_ranks", "top_items", "top_relevant", "top_scores")


@dataclass(frozen=True, eq=False)
class Stored:
    """The rankings of an evaluation, as `queries.npz` keeps them.

    Attributes:
      data_fingerprint: of the products that were ranked.
      captions: (Q,) the texts. owners: (Q,) the product of each. ids: (G,) of the products.
      best_ranks, top_items, top_relevant, top_scores: (Q, ...) of the texts, as in `protocols.Rankings`.
      values: direction -> name -> (Q,) or (G,) figures.
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
    """Writes metrics.json and its tables metrics.csv and by_category.csv, each whole or not at all."""
    _write(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    rows = [
        (direction, name, figure["value"], figure["low"], figure["high"], metrics.get(chance, {}).get(name, ""))
        for direction, chance in zip(DIRECTIONS, ("chance", "chance_image_to_text"), strict=True)
        for name, figure in metrics[direction].items()
    ]
    _write(folder / "metrics.csv", _table(("direction", "metric", "value", "low", "high", "chance"), rows))
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
    """Writes queries.npz, for comparisons, and queries.csv: each text, its product and the rank of its first answer."""
    found = details.text_to_image
    values = {
        f"{direction}/{name}": of_queries
        for direction in DIRECTIONS
        for name, of_queries in getattr(details, direction).values.items()
    }
    file = io.BytesIO()
    np.savez_compressed(
        file,
        data_fingerprint=np.asarray(data_fingerprint),
        captions=np.asarray(captions, str),
        owners=np.asarray(owners),
        ids=np.asarray(ids, str),
        **{name: getattr(found, name) for name in _ARRAYS},
        **values,
    )
    _write(folder / QUERIES, file.getvalue())
    rows = (
        (caption, ids[owner], rank, ids[top[0]])
        for caption, owner, rank, top in zip(captions, owners, found.best_ranks, found.top_items, strict=True)
    )
    _write(folder / "queries.csv", _table(("text", "product", "rank", "found first"), rows))


def read_queries(folder: Path) -> Stored:
    """Returns the rankings that an evaluation left in its folder; UserError where there are none."""
    path = folder / QUERIES
    if not path.exists():
        raise UserError(f"{path} is missing: evaluate that run first")
    with np.load(path, allow_pickle=False) as file:
        values = {
            direction: {name.partition("/")[2]: file[name] for name in file.files if name.startswith(direction + "/")}
            for direction in DIRECTIONS
        }
        return Stored(
            str(file["data_fingerprint"]),
            *(file[name] for name in ("captions", "owners", "ids", *_ARRAYS)),
            values=values,
        )


def compare(baseline: Stored, other: Stored, *, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Returns direction -> metric -> {"baseline", "value", "difference", "low", "high", "p"}, other minus baseline.

    The interval is of the difference, over queries; p is that of the paired bootstrap.

    Raises:
      UserError: the two did not rank the same products for the same queries.
    """
    same = (np.array_equal(getattr(baseline, name), getattr(other, name)) for name in ("owners", "ids"))
    if baseline.data_fingerprint != other.data_fingerprint or not all(same):
        raise UserError(
            f"the two evaluations are of other products (data fingerprints {baseline.data_fingerprint} and "
            f"{other.data_fingerprint}): evaluate both on the same catalogue and split"
        )
    result = {}
    for direction in DIRECTIONS:
        names = [name for name in other.values[direction] if name in baseline.values[direction]]
        old, new = (np.stack([run.values[direction][n] for n in names], dtype=np.float64) for run in (baseline, other))
        low, high = significance.bootstrap_interval(new - old, seed=seed)
        figures = zip(old.mean(1), new.mean(1), (new - old).mean(1), low, high, strict=True)
        ps = significance.paired_bootstrap(new, old, seed=seed)
        keys = ("baseline", "value", "difference", "low", "high", "p")
        result[direction] = {
            name: dict(zip(keys, map(float, (*row, p)), strict=True))
            for name, row, p in zip(names, figures, ps, strict=True)
        }
    return result


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    return file.getvalue().encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomically(path) as temporary:
        temporary.write_bytes(content)
