"""The evaluation report: one HTML file that needs nothing beside it, for a reader who was not there."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np

SHOWN_QUERIES, SHOWN_SEED, SHOWN_CATEGORIES = 24, 0, 20
_LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH, _HEIGHT = 56, 24, 14, 44, 440, 250  # of a curve, in SVG units


@dataclass(frozen=True)
class Item:
    """A picture that was found: its encoded file, mime type, caption, whether it is right, and its score."""

    image_bytes: bytes = field(repr=False)
    mime: str
    caption: str
    relevant: bool
    score: float

    @property
    def data_uri(self) -> str:
        """The picture itself, as an `img` element takes it."""
        return f"data:{self.mime};base64,{base64.b64encode(self.image_bytes).decode()}"


@dataclass(frozen=True)
class QueryRow:
    """A query as the report shows it.

    Attributes:
      caption: the text that was searched for.
      rank: of the first right picture.
      items: what was found, best first.
      answer: a right picture, shown at the end of the row where none of the items is right.
    """

    caption: str
    rank: int
    items: Sequence[Item]
    answer: Item | None = None


def sample_queries(queries: int) -> np.ndarray:
    """Returns up to 24 of the numbers 0..queries-1, at random under a fixed seed: never chosen by how well they did."""
    random = np.random.default_rng(SHOWN_SEED)
    return random.choice(queries, min(SHOWN_QUERIES, queries), replace=False)


def write(
    path: Path,
    metrics: Mapping,
    *,
    title: str,
    run: Mapping[str, str],
    queries: Sequence[QueryRow] = (),
    curve: Sequence[Mapping] = (),
) -> Path:
    """Returns `path`, having written the report there: pictures and style inside, no request to anywhere.

    Args:
      path: the HTML file; its folder is made.
      metrics: what `protocols.evaluate` returns, or the content of metrics.json.
      title: the heading, as "quickstart, step 2,000".
      run: what identifies and reproduces the run, name to text; "command" is set as code.
      queries: rows of the queries that `sample_queries` names.
      curve: rows of training, {"step", "loss", "hit@1"}, each figure where it was measured; may be empty.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": _percent, "number": _number, "interval": _interval, "chance": _chance}
    panels = [
        _panel(curve, "loss", "training loss"),
        _panel(curve, "hit@1", "hit@1, text to image"),
        _panel(curve, "ema/hit@1", "hit@1 of the moving average"),
    ]
    categories = list(metrics["by_category"].items())
    html = environment.get_template("report.html.j2").render(
        title=title,
        run=run,
        metrics=metrics,
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
        panels=[panel for panel in panels if panel],
        frame={"left": _LEFT, "right": _WIDTH - _RIGHT, "top": _TOP, "bottom": _HEIGHT - _BOTTOM}
        | {"width": _WIDTH, "height": _HEIGHT},
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _chance(share: float) -> str:
    """Returns a percentage of two significant digits: chance is small."""
    return f"{100 * share:.2g}%" if share < 0.1 else _percent(share)


def _number(value: float, name: str) -> str:
    if name == "median_rank":
        return f"{value:,.1f}".removesuffix(".0")
    return f"{value:.3f}" if name == "mrr" else _percent(value)


def _interval(entry: Mapping[str, float], name: str) -> str:
    low, high = _number(entry["low"], name), _number(entry["high"], name)
    return f"{low.removesuffix('%')}–{high}"


def _panel(curve: Sequence[Mapping], key: str, label: str) -> dict | None:
    """Returns what the template draws of one figure over steps: points and ticks in SVG units, None without points."""
    points = [(row["step"], row[key]) for row in curve if row.get(key) is not None and math.isfinite(row[key])]
    if not points:
        return None
    points.sort()
    steps, values = [step for step, _ in points], [value for _, value in points]
    x_ticks, y_ticks = _ticks(min(steps), max(steps), whole=True), _ticks(min(values), max(values))
    x_low, x_high = min(x_ticks[0], steps[0]), max(x_ticks[-1], steps[-1])

    def x(step):
        return round(_LEFT + (step - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value):
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    return {
        "label": label,
        "line": " ".join(f"{x(step)},{y(value)}" for step, value in points),
        "last": (x(steps[-1]), y(values[-1])),
        "summary": f"{label} from {values[0]:.3g} at step {steps[0]:,} to {values[-1]:.3g} at step {steps[-1]:,}",
        "x_ticks": [(x(tick), f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(y(tick), f"{tick:.4g}") for tick in y_ticks],
    }


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Returns three to seven round numbers, the first at most `low` and the last at least `high`."""
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    if whole:
        step = max(1, math.ceil(step))
    first = math.floor(low / step)
    return [tick * step for tick in range(first, math.ceil(high / step) + 1)]
