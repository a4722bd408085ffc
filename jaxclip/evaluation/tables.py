"""What the commands print at their end."""

from collections.abc import Mapping
from typing import Any


def headline(metrics: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> str:
    """Returns the headline figures as lines for the terminal: value [95% interval] beside chance.

    `raw` are the figures of the parameters themselves, where `metrics` are those of their moving average. Rankings
    that were re-ranked show both stages.
    """
    if "reranked" in metrics:
        return _two_stages(metrics)
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for direction in ("text_to_image", "image_to_text"):
        label = direction.replace("_", "-")
        for head, found in ((label, metrics), ("  not averaged", raw)):
            if found:
                figures = [found[direction][name] for name in names]
                cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
                lines.append(f"{head:16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][name]:>24.4f}" for name in names))
    lines.append(f"{metrics['queries']:,} queries, {metrics['gallery']:,} pictures; 95% bootstrap intervals")
    if metrics.get("parameters") == "ema":
        lines.append("of the moving average of the parameters (optimizer.ema), but for rows called otherwise")
    return "\n".join(lines)


def _two_stages(metrics: Mapping[str, Any]) -> str:
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for title, stage in (("first stage", "first_stage"), ("re-ranked", "text_to_image")):
        figures = [metrics[stage][hit] for hit in names]
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
        lines.append(f"{title:16}" + "".join(f"{cell:>24}" for cell in cells))
    seen = metrics["reranked"]
    cells = [f"{seen['compared'][hit]['difference']:+.3f}, p {seen['compared'][hit]['p']:.4f}" for hit in names]
    lines.append(f"{'difference':16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][hit]:>24.4f}" for hit in names))
    share = {name: f"{seen[name]['value']:.1%}" for name in ("improved", "unchanged", "worsened", "retrieved")}
    lines.append(
        f"{metrics['queries']:,} queries: {share['improved']} improved, {share['unchanged']} unchanged, "
        f"{share['worsened']} worsened; the top {seen['k']} hold an answer to {share['retrieved']}"
    )
    return "\n".join(lines)


def before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns text-to-image hit@k before and after training, then by category, as lines for the terminal.

    These are Tables 2 and 1 of the fit-aware paper, which calls hit@k R@k.
    """
    names = [name for name in after["text_to_image"] if name.startswith("hit@")]
    head = "".join(f"{name.replace('hit@', 'R@'):>8}" for name in names)
    width = max([24, *(len(category) + 10 for category in after["by_category"])])

    def line(title: str, *rows: Mapping[str, Any]) -> str:
        cells = ("".join(f"{row[name]['value']:8.3f}" for name in names) for row in rows)
        return f"{title:{width}}" + "   ".join(cells)

    lines = [f"{'':{width}}{head}"]
    lines += [line("zero-shot", before["text_to_image"]), line("fine-tuned", after["text_to_image"])]
    lines += ["", f"{'':{width}}{'zero-shot':<{len(head)}}   fine-tuned", f"{'':{width}}{head}   {head}"]
    for category, row in after["by_category"].items():
        lines.append(line(f"{category} ({row['queries']})", before["by_category"][category], row))
    lines.append("text to image; R@k is hit@k: the share of queries with a right picture in the top k")
    return "\n".join(lines)


def compared(figures: Mapping[str, Any]) -> str:
    """Returns what `results.compare` says as lines for the terminal."""
    lines = []
    for direction, rows in figures.items():
        lines.append(f"{direction.replace('_', '-'):16}{'baseline':>10}{'this':>10}{'difference':>28}{'p':>10}")
        for name, row in rows.items():
            interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            p = "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
            lines.append(f"  {name:14}{row['baseline']:>10.3f}{row['value']:>10.3f}{interval:>28}{p:>10}")
    return "\n".join(lines)
