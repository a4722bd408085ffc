"""Tables of metrics that the commands print on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxclip.evaluation.rows import DIRECTIONS, RIGHT, Row, rows

LABEL, CELL = 26, 23
"""Widths of a table's first column and of a figure with its interval."""
TITLES = {
    "text_to_image": "text to image",
    "image_to_text": "image to text",
    "image_to_image": "image to image",
    "judged": "judged queries",
}


def headline(metrics: Mapping[str, Any], raw: Mapping[str, Any] | None = None) -> str:
    """Returns a table of hit@k by protocol and direction, as value [95% interval], and what the protocols count.

    Below a row are the figures without averaging, the highest possible value where texts repeat, and the chance of a
    random order unless it is that of the row above. A re-ranked evaluation shows both stages, and ignores `raw`.

    Args:
      metrics: the metrics of an evaluation.
      raw: the metrics of the parameters themselves, if `metrics` are of their moving average; None to leave them out.
    """
    names = [name for name in metrics["text_to_image"] if name.startswith("hit@")]
    shown = [row for row in rows(metrics) if row.protocol in RIGHT and names[0] in row.figures]
    raw_figures = {_key(row): row.figures for row in rows(raw)} if raw and "reranked" not in metrics else {}
    lines = [f"{'':{LABEL}}" + "".join(f"{name:>{CELL}}" for name in names) + f"{'queries':>10}{'gallery':>10}"]
    heading, chance = "", {}
    for row in shown:
        if title(row) != heading:
            heading, chance = title(row), {}
            lines.append(heading)
        figures = row.figures
        lines.append(f"{f'  {label(row)}':{LABEL}}{_cells(figures, names)}{_sizes(row)}".rstrip())
        if _key(row) in raw_figures:
            lines.append(f"{'    not averaged':{LABEL}}{_cells(raw_figures[_key(row)], names)}")
        if row.stage == "first stage":
            continue
        if row.stage:
            part = metrics if row.protocol == "groups" else metrics[row.protocol]
            lines.append(f"{'    difference':{LABEL}}{_differences(part['reranked']['compared'], names)}")
        if row.ceiling:
            lines.append(f"{'    highest possible':{LABEL}}{_plain(row.ceiling, names)}")
        if row.chance and row.chance != chance:
            lines.append(f"{'    chance':{LABEL}}{_plain(row.chance, names, digits=4)}")
            chance = row.chance
    lines.append("")
    if "reranked" in metrics:
        lines += _changes(metrics)
    lines += _explanations(metrics, shown, with_raw=bool(raw_figures))
    return "\n".join([*lines, *metrics.get("notes", [])])


def _key(row: Row) -> tuple[str, ...]:
    return row.protocol, row.direction, row.source


def title(row: Row) -> str:
    """Returns the heading of a row: its direction in words."""
    return TITLES["judged" if row.protocol == "judged" else row.direction] + ", catalogues" * bool(row.source)


def label(row: Row) -> str:
    """Returns the name of a row below its heading: catalogue, protocol and stage."""
    return ", ".join(filter(None, (row.source, row.protocol.replace("_", " "), row.stage)))


def _sizes(row: Row) -> str:
    return f"{row.queries:>10,}{row.gallery:>10,}" if row.queries else ""


def _cells(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    entries = (figures[name] for name in names)
    cells = (f"{f['value']:.3f}" + (f" [{f['low']:.3f}, {f['high']:.3f}]" if "low" in f else "") for f in entries)
    return "".join(f"{cell:>{CELL}}" for cell in cells)


def _plain(values: Mapping[str, float], names: Sequence[str], digits: int = 3) -> str:
    return "".join(f"{values[name]:>{CELL}.{digits}f}" for name in names)


def _differences(compared: Mapping[str, Any], names: Sequence[str]) -> str:
    cells = (f"{compared[name]['difference']:+.3f}, p {_p_value(compared[name]['p'])}" for name in names)
    return "".join(f"{cell:>{CELL}}" for cell in cells)


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _changes(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the second stage changed, one line for each protocol."""
    lines = []
    for protocol in ("groups", "pairs"):
        part = metrics if protocol == "groups" else metrics.get(protocol, {})
        if "reranked" not in part:
            continue
        reranked = part["reranked"]
        share = {name: f"{reranked[name]['value']:.1%}" for name in ("improved", "unchanged", "worsened", "retrieved")}
        lines.append(
            f"re-ranking, {protocol}: of {part['queries']:,} queries {share['improved']} improved, "
            f"{share['unchanged']} unchanged, {share['worsened']} worsened; {share['retrieved']} have an answer in the "
            f"top {reranked['k']}"
        )
    return lines


def _explanations(metrics: Mapping[str, Any], shown: Sequence[Row], *, with_raw: bool) -> list[str]:
    """Returns which answers are right in each protocol of a table, and what else must be said with it."""
    lines = [f"{name.replace('_', ' ')}: {RIGHT[name]}" for name in dict.fromkeys(row.protocol for row in shown)]
    judged = metrics.get("judged", {})
    if "ndcg@10" in judged:
        lines.append(
            f"judged queries: nDCG@10 {judged['ndcg@10']['value']:.3f}, MRR {judged['mrr']['value']:.3f}; "
            f"{judged['judged@10']['value']:.1%} of the first ten products are judged; "
            f"of the other queries {judged['without_answer']:,} have no answer among these products, and "
            f"{judged['unjudged']:,} no judged product"
        )
    lines += [f"{name}: {reason}" for name, reason in reasons(metrics).items()]
    lines.append(
        "hit@k: share of queries with a right answer among the first k; 95% bootstrap intervals over queries (single: "
        "over groups)"
    )
    if metrics.get("parameters") == "ema":
        except_rows = ", except rows 'not averaged'" if with_raw else ""
        lines.append(f"figures of the moving average of the parameters (optimizer.ema){except_rows}")
    return lines


def reasons(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns protocol -> why it has no figures."""
    parts = {name.replace("_", " "): metrics.get(name, {}) for name in RIGHT}
    parts |= {f"catalogue {name}": part for name, part in metrics.get("sources", {}).items()}
    return {name: part["reason"] for name, part in parts.items() if "reason" in part}


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
    for protocol in ("groups", "pairs"):
        for stage, metrics in (("zero-shot", before), ("fine-tuned", after)):
            figures = metrics if protocol == "groups" else metrics.get(protocol, {})
            if "text_to_image" in figures:
                lines.append(line(f"{stage}, {protocol}", figures["text_to_image"]))
    lines += ["", f"{'':{width}}{'zero-shot':<{len(header)}}   fine-tuned", f"{'':{width}}{header}   {header}"]
    for category, row in after["by_category"].items():
        lines.append(line(f"{category} ({row['queries']})", before["by_category"][category], row))
    lines.append(
        "text to image; groups: every product of the query's group is right; pairs: its own alone, as papers count; by "
        "category: groups; R@k is hit@k, the share of queries with a right product in the top k"
    )
    return "\n".join(lines)


def compared(figures: Mapping[str, Any]) -> str:
    """Returns the table of `figures`: the result of `results.compare`, with "queries", "gallery" and "notes"."""
    lines = []
    for direction in DIRECTIONS:
        by_metric = figures[direction]
        heading = f"{TITLES[direction]}, groups"
        lines.append(f"{heading:24}{'baseline':>10}{'this':>10}{'difference':>28}{'p':>10}")
        for name, row in by_metric.items():
            interval = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            lines.append(
                f"  {name:22}{row['baseline']:>10.3f}{row['value']:>10.3f}{interval:>28}{_p_value(row['p']):>10}"
            )
    lines += [
        f"groups: {RIGHT['groups']}",
        "95% bootstrap intervals, and p-values of the paired bootstrap, over queries",
        f"{figures['queries']:,} captions and {figures['gallery']:,} products that neither run was trained on",
        *figures["notes"],
    ]
    return "\n".join(lines)
