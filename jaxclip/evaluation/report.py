"""The evaluation report: one self-contained HTML file."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from jaxclip.catalog.pictures import mime
from jaxclip.evaluation import charts, protocols, tables
from jaxclip.evaluation.rows import RIGHT, rows
from jaxclip.ranking.candidates import rank_changes

SHOWN_QUERIES, SHOWN_SEED, SHOWN_CATEGORIES = 24, 0, 20
THUMBNAIL_BYTES, THUMBNAIL_SIDE = 12_000, 220


@dataclass(frozen=True)
class Item:
    """A ranked picture.

    Attributes:
      image_bytes: the encoded picture.
      mime: its media type, such as "image/jpeg".
      caption: the title of the product.
      relevant: whether it is relevant to the query.
      score: its score for the query; NaN if it is not known.
    """

    image_bytes: bytes = field(repr=False)
    mime: str
    caption: str
    relevant: bool
    score: float

    @property
    def data_uri(self) -> str:
        """The picture as a data URI, the `src` of an `img` element."""
        return f"data:{self.mime};base64,{base64.b64encode(self.image_bytes).decode()}"


@dataclass(frozen=True)
class QueryRow:
    """A query and the pictures ranked first for it.

    Attributes:
      caption: the text of the query.
      rank: the rank of the first relevant picture.
      items: the pictures ranked first, best first.
      answer: a relevant picture, shown at the end of the row if none of the items is relevant.
    """

    caption: str
    rank: int
    items: Sequence[Item]
    answer: Item | None = None


@dataclass(frozen=True)
class Change:
    """A query that two runs rank differently.

    Attributes:
      caption: the text of the query.
      before: the baseline's ranking.
      after: this run's ranking.
    """

    caption: str
    before: QueryRow
    after: QueryRow


@dataclass(frozen=True)
class Comparison:
    """The comparison of a run with a baseline.

    Attributes:
      name: the baseline's name.
      figures: the result of `results.compare`.
      best_ranks: (Q,) the baseline's ranks of the first relevant pictures.
      improved: the queries that improved most, largest change first.
      worsened: the queries that worsened most, largest change first.
    """

    name: str
    figures: Mapping
    best_ranks: np.ndarray
    improved: Sequence[Change]
    worsened: Sequence[Change]


def sample_queries(queries: int) -> np.ndarray:
    """Returns the indices of at most 24 random queries; the seed is fixed, so the choice does not depend on results."""
    random = np.random.default_rng(SHOWN_SEED)
    return random.choice(queries, min(SHOWN_QUERIES, queries), replace=False)


def thumbnail(encoded: bytes) -> tuple[bytes, str]:
    """Returns a thumbnail and its media type; files of at most 12,000 bytes are returned unchanged.

    A report contains hundreds of pictures, so each has to be small.
    """
    if len(encoded) <= THUMBNAIL_BYTES:
        return encoded, mime(encoded)
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue(), "image/jpeg"


def write(path: Path, page: str) -> Path:
    """Writes a page, creating its folder if needed, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def report_page(
    metrics: Mapping,
    *,
    title: str,
    run: Mapping[str, str],
    queries: Sequence[QueryRow] = (),
    curve: Sequence[Mapping] = (),
    best_ranks: np.ndarray | None = None,
    failures: Mapping[str, Sequence[QueryRow]] | None = None,
    comparison: Comparison | None = None,
) -> str:
    """Returns the report as one HTML page, with pictures and styles embedded so that it loads nothing from elsewhere.

    Args:
      metrics: the metrics of `protocols.evaluate`, or the content of metrics.json.
      title: the heading, such as "quickstart, step 2,000".
      run: facts that identify and reproduce the run, name -> text; "command" is shown as code.
      queries: the queries selected by `sample_queries`.
      curve: rows of the training log with "step" and, where they were measured, "loss", "hit@1" and "ema/hit@1".
      best_ranks: (Q,) the rank of each text's first relevant picture, for the hit@k curve and the histogram.
      failures: category -> the queries with the worst ranks.
      comparison: the comparison with a baseline, if there is one.
    """
    training_charts = [
        charts.training(curve, "loss", "training loss"),
        charts.training(curve, "hit@1", "hit@1, text to image"),
        charts.training(curve, "ema/hit@1", "hit@1 of the moving average"),
        charts.training(curve, "test/hit@1", "hit@1, text to image, on the split that is reported"),
    ]
    rank_charts = []
    if best_ranks is not None:
        runs = {comparison.name: comparison.best_ranks, "this run": best_ranks} if comparison else {"": best_ranks}
        gallery = metrics["gallery"]
        rank_charts = [charts.hit_curve(runs, gallery), charts.rank_histogram(best_ranks, gallery)]
    shown = [row for row in rows(metrics) if row.protocol in RIGHT and "hit@1" in row.figures]
    by_heading: dict[str, list] = {}
    for row in shown:
        by_heading.setdefault(tables.title(row), []).append((tables.label(row), row))
    categories = list(metrics["by_category"].items())
    return _render(
        "report.html.j2",
        title=title,
        run=run,
        metrics={"notes": [], **metrics},
        protocols=by_heading,
        right={
            name.replace("_", " "): meaning for name, meaning in RIGHT.items() if name in {r.protocol for r in shown}
        },
        reasons=tables.reasons(metrics),
        judged=next((row.figures for row in shown if row.protocol == "judged"), None),
        ks=[int(name.removeprefix("hit@")) for name in metrics["text_to_image"] if name.startswith("hit@")],
        directions=(
            ("text_to_image", "Text to image", "chance"),
            ("image_to_text", "Image to text", "chance_image_to_text"),
        ),
        hits=[name for name in metrics["text_to_image"] if name.startswith("hit@")],
        others=[name for name in metrics["text_to_image"] if not name.startswith("hit@")],
        categories=categories[:SHOWN_CATEGORIES],
        more_categories=categories[SHOWN_CATEGORIES:],
        queries=queries,
        seed=SHOWN_SEED,
        panels=[chart for chart in training_charts if chart],
        ranked=rank_charts,
        failures=failures or {},
        comparison=comparison,
        moved=protocols.means(rank_changes(comparison.best_ranks, best_ranks), SHOWN_SEED) if comparison else {},
        frame=charts.FRAME,
    )


def sheet_page(
    sheet: Mapping[str, Mapping[str, Sequence[Item]]],
    *,
    runs: Mapping[str, Mapping[str, str]],
    command: str,
) -> str:
    """Returns the HTML page that shows the pictures ranked first for queries without known relevant items.

    Args:
      sheet: query -> name of the run -> pictures, best first; each run is a row below its query.
      runs: name of the run -> facts that identify its checkpoint and catalogue, name -> text.
      command: the command line that reproduces the page.
    """
    return _render("sheet.html.j2", sheet=sheet, runs=runs, command=command)


def _render(template: str, **values) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "number": _number, "interval": _interval, "chance": _chance}
    environment.filters |= {"named": _named, "signed": _signed}
    return environment.get_template(template).render(**values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _chance(share: float) -> str:
    """Returns a percentage; below 10% it has two significant digits, because chance is often far below 1%."""
    return f"{100 * share:.2g}%" if share < 0.1 else _percent(share)


def _number(value: float, name: str) -> str:
    if name.endswith("_rank"):
        return f"{value:,.1f}".removesuffix(".0")
    return f"{value:.3f}" if name.startswith("mrr") else _percent(value)


def _interval(entry: Mapping[str, float], name: str) -> str:
    low, high = _number(entry["low"], name), _number(entry["high"], name)
    return f"{low.removesuffix('%')}–{high}"


def _signed(value: float, name: str) -> str:
    magnitude = _number(abs(value), name)
    is_zero = not float(magnitude.rstrip("%").replace(",", ""))
    return ("±" if is_zero else "+" if value > 0 else "−") + magnitude


def _named(name: str) -> str:
    """Returns a metric's usual name, such as "MRR" for "mrr"."""
    names = {"mrr": "MRR", "mrr@10": "MRR@10", "map": "mAP", "weighted_f1": "weighted F1", "macro_f1": "macro F1"}
    return names.get(name, name.replace("ndcg", "nDCG").replace("_", " "))
