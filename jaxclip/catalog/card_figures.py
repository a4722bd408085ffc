"""Histogram geometry for the data card."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_BARS = 24
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 52, 8, 14, 44, 440, 240  # margins and size of a histogram in SVG units


def histogram(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Returns the statistics, bars and ticks of a histogram of whole numbers; None if there are no numbers.

    If the range is too wide for MAX_BARS bars of one value each, the bars end at about the 99th percentile, and the
    last bar also counts all larger values, so that a few outliers do not compress the rest.
    """
    values = np.asarray(lengths)
    if not len(values):
        return None
    shortest, longest = int(values.min()), int(values.max())
    top = longest if longest - shortest < MAX_BARS else max(int(np.percentile(values, 99)), shortest)
    bar_width = math.ceil((top - shortest + 1) / MAX_BARS)
    bars = (top - shortest) // bar_width + 1
    counts = np.bincount(np.minimum((values - shortest) // bar_width, bars - 1), minlength=bars).tolist()
    step = _round_step(max(counts) / 4)
    highest = step * math.ceil(max(counts) / step)
    slot = (WIDTH - LEFT - RIGHT) / max(bars, 8)

    def y(count: int) -> float:
        return round(HEIGHT - BOTTOM - count / highest * (HEIGHT - TOP - BOTTOM), 1)

    label_every = math.ceil(bars / 12)
    columns = []
    for bar, count in enumerate(counts):
        first, last = shortest + bar * bar_width, shortest + (bar + 1) * bar_width - 1
        if bar == bars - 1 and last < longest:
            label, span = f"{first}+", f"{first} to {longest}"
        else:
            label, span = str(first), str(first) if bar_width == 1 else f"{first} to {last}"
        columns.append(
            {"x": round(LEFT + (bar + 0.1) * slot, 1), "y": y(count), "width": round(0.8 * slot, 1)}
            | {"height": round(HEIGHT - BOTTOM - y(count), 1), "count": count, "span": span}
            | {"middle": round(LEFT + (bar + 0.5) * slot, 1), "label": label if bar % label_every == 0 else ""}
        )
    return {
        "total": len(values),
        "shortest": shortest,
        "median": f"{np.median(values):g}",
        "longest": longest,
        "bar_width": bar_width,
        "columns": columns,
        "ticks": [(y(tick), tick) for tick in range(0, highest + 1, step)],
        "frame": {"left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM, "width": WIDTH, "height": HEIGHT},
    }


def _round_step(rough: float) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, ... that is at least `rough`."""
    power = 10 ** max(0, math.floor(math.log10(max(rough, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
