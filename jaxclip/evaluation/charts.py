"""The report's charts: coordinates, in SVG units, of the lines, bars and ticks that the template draws."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 56, 24, 14, 44, 440, 250
FRAME = {
    "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM, "width": WIDTH, "height": HEIGHT,
}  # fmt: skip
RANK_ENDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)  # last rank of each bar but the last


def training(curve: Sequence[Mapping], key: str, label: str) -> dict | None:
    """Returns the line chart of the figure `key` over the training steps, None if `curve` has no finite value of it."""
    points = [(row["step"], row[key]) for row in curve if row.get(key) is not None and math.isfinite(row[key])]
    if not points:
        return None
    points.sort()
    steps, values = [step for step, _ in points], [value for _, value in points]
    x_ticks, y_ticks = _ticks(min(steps), max(steps), integers=True), _ticks(min(values), max(values))
    x_low, x_high = min(x_ticks[0], steps[0]), max(x_ticks[-1], steps[-1])
    line_points = [(_x((s - x_low) / (x_high - x_low)), _y(v, y_ticks[0], y_ticks[-1])) for s, v in points]
    return {
        "label": label,
        "x_label": "step",
        "lines": [{"name": "", "points": line_points}],
        "summary": f"{label} from {values[0]:.3g} at step {steps[0]:,} to {values[-1]:.3g} at step {steps[-1]:,}",
        "x_ticks": [(_x((tick - x_low) / (x_high - x_low)), f"{tick:,.0f}") for tick in x_ticks],
        "y_ticks": [(_y(tick, y_ticks[0], y_ticks[-1]), f"{tick:.4g}") for tick in y_ticks],
    }


def hit_curve(best_ranks: Mapping[str, np.ndarray], gallery: int) -> dict:
    """Returns the coordinates of the chart of text-to-image hit@k over k (logarithmic), with a line per evaluated run.

    `best_ranks` maps each run's name to the (Q,) ranks of its queries' first relevant items. The axis ends at 1,000 or
    at the number of items in the gallery, whichever is less.
    """
    last_k = max(2, min(1000, gallery))
    ks = np.unique(np.round(np.geomspace(1, last_k, 60)).astype(int))

    def x(k):
        return _x(math.log(k) / math.log(last_k))

    shares = {name: [float((ranks <= k).mean()) for k in ks] for name, ranks in best_ranks.items()}
    lines = [
        {"name": name, "points": [(x(k), _y(value, 0, 1)) for k, value in zip(ks, values, strict=True)]}
        for name, values in shares.items()
    ]
    ticks = [k for k in (1, 3, 10, 30, 100, 300, 1000) if k <= last_k]
    summaries = (f"{name or 'hit@k'}: {v[0]:.3f} at 1, {v[-1]:.3f} at {last_k}" for name, v in shares.items())
    return {
        "label": "hit@k, text to image, groups",
        "x_label": "k",
        "lines": lines,
        "summary": "; ".join(summaries),
        "x_ticks": [(x(k), f"{k:,}") for k in ticks],
        "y_ticks": [(_y(share, 0, 1), f"{share:g}") for share in (0, 0.2, 0.4, 0.6, 0.8, 1)],
    }


def rank_histogram(best_ranks: np.ndarray, gallery: int) -> dict:
    """Returns the histogram of `best_ranks`, the (Q,) ranks of the queries' first relevant items in the gallery."""
    ends = [end for end in RANK_ENDS if end < gallery] + [gallery]
    starts = [1] + [end + 1 for end in ends[:-1]]
    counts = np.histogram(best_ranks, [*starts, gallery + 1])[0]
    shares = counts / len(best_ranks)
    ticks = _ticks(0.0, float(shares.max()))
    width = (WIDTH - LEFT - RIGHT) / len(ends)
    bars = []
    for index, (start, end, count, share) in enumerate(zip(starts, ends, counts, shares, strict=True)):
        top = _y(share, 0, ticks[-1])
        interval = f"{start:,}" if start == end else f"{start:,}–{end:,}"
        bars.append({
            "x": round(LEFT + index * width + 1.5, 1), "y": top, "width": round(width - 3, 1),
            "height": round(HEIGHT - BOTTOM - top, 1), "title": f"rank {interval}: {count:,} queries ({share:.1%})",
        })  # fmt: skip
    bar_labels = [(round(LEFT + (index + 0.5) * width, 1), _short(end)) for index, end in enumerate(ends)]
    return {
        "label": "share of queries",
        "x_label": "rank of the first relevant image, up to",
        "bars": bars,
        "summary": "; ".join(bar["title"] for bar in bars),
        "x_ticks": bar_labels,
        "y_ticks": [(_y(tick, 0, ticks[-1]), f"{tick:.4g}") for tick in ticks],
    }


def _x(share: float) -> float:
    """Returns the horizontal position, in SVG units, of a point on the axis: 0 is its left end, 1 its right end."""
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float, low: float, high: float) -> float:
    """Returns the vertical position, in SVG units, of a value on an axis from `low` to `high`."""
    return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)


def _short(number: int) -> str:
    return f"{number / 1000:.3g}k" if number >= 1000 else str(number)


def _ticks(low: float, high: float, integers: bool = False) -> list[float]:
    """Returns two to seven evenly spaced round numbers that cover the range from `low` to `high`."""
    if high == low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    min_step = (high - low) / 4
    power = 10 ** math.floor(math.log10(min_step))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= min_step)
    if integers:
        step = max(1, math.ceil(step))
    first = math.floor(low / step)
    return [tick * step for tick in range(first, math.ceil(high / step) + 1)]
