"""Tables of metrics that the commands print on the terminal."""

from collections.abc import Mapping
from typing import Any


def headline(metrics: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> str:
    """Returns a table of hit@k in both directions, as value [95% interval], and of text-to-image hit@k at chance.

    The table of a re-ranked evaluation shows text to image before and after re-ranking, and ignores `raw`.

    Args:
      metrics: the metrics of an evaluation.
      raw: the metrics of the parameters themselves, if `metrics` are of their moving average; None to leave them out.
    """
    if "reranked" in metrics:
        return _two_stages(metrics)
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for direction in ("text_to_image", "image_to_text"):
        label = direction.replace("_", "-")
        for title, evaluation in ((label, metrics), ("  not averaged", raw)):
            if evaluation:
                figures = [evaluation[direction][name] for name in names]
                cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
                lines.append(f"{title:16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][name]:>24.4f}" for name in names))
    lines.append(f"{metrics['queries']:,} queries, {metrics['gallery']:,} pictures; 95% bootstrap intervals")
    if metrics.get("parameters") == "ema":
        lines.append(
            "figures of the moving average of the parameters (optimizer.ema), except rows marked 'not averaged'"
        )
    return "\n".join(lines)


def _two_stages(metrics: Mapping[str, Any]) -> str:
    """Returns the table of a re-ranked evaluation."""
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    lines = [f"{'':16}" + "".join(f"{name:>24}" for name in names)]
    for title, stage in (("first stage", "first_stage"), ("re-ranked", "text_to_image")):
        figures = [metrics[stage][hit] for hit in names]
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for f in figures]
        lines.append(f"{title:16}" + "".join(f"{cell:>24}" for cell in cells))
    reranked = metrics["reranked"]
    cells = [f"{reranked['compared'][hit]['difference']:+.3f}, p {reranked['compared'][hit]['p']:.4f}" for hit in names]
    lines.append(f"{'difference':16}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"{'chance':16}" + "".join(f"{metrics['chance'][hit]:>24.4f}" for hit in names))
    share = {name: f"{reranked[name]['value']:.1%}" for name in ("improved", "unchanged", "worsened", "retrieved")}
    lines.append(
        f"{metrics['queries']:,} queries: {share['improved']} improved, {share['unchanged']} unchanged, "
        f"{share['worsened']} worsened; {share['retrieved']} have a relevant picture in the top {reranked['k']}"
    )
    return "\n".join(lines)


def before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns two tables of text-to-image hit@k before and after training: over all queries, and by category.

    They have the layout of Tables 2 and 1 of the fit-aware paper (see `reranking.networks.Paper`), which writes R@k for
    hit@k.
    """
    names = [name for name in after["text_to_image"] if name.startswith("hit@")]
    header = "".join(f"{name.replace('hit@', 'R@'):>8}" for name in names)
    width = max([24, *(len(category) + 10 for category in after["by_category"])])

    def line(title: str, *rows: Mapping[str, Any]) -> str:
        cells = ("".join(f"{row[name]['value']:8.3f}" for name in names) for row in rows)
        return f"{title:{width}}" + "   ".join(cells)

    lines = [f"{'':{width}}{header}"]
    lines += [line("zero-shot", before["text_to_image"]), line("fine-tuned", after["text_to_image"])]
    lines += ["", f"{'':{width}}{'zero-shot':<{len(header)}}   fine-tuned", f"{'':{width}}{header}   {header}"]
    for category, row in after["by_category"].items():
        lines.append(line(f"{category} ({row['queries']})", before["by_category"][category], row))
    lines.append("text to image; R@k is hit@k: the share of queries with a relevant picture in the top k")
    return "\n".join(lines)


def compared(figures: Mapping[str, Any]) -> str:
    """Returns the table of `figures`, the result of `results.compare`."""
    lines = []
    for direction, rows in figures.items():
        lines.append(f"{direction.replace('_', '-'):16}{'baseline':>10}{'this':>10}{'difference':>28}{'p':>10}")
        for name, row in rows.items():
            interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            p = "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
            lines.append(f"  {name:14}{row['baseline']:>10.3f}{row['value']:>10.3f}{interval:>28}{p:>10}")
    return "\n".join(lines)
