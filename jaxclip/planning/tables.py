"""Plans as tables for the terminal."""

from collections.abc import Callable, Sequence

from jaxclip.planning.fit import Plan

ROWS: Sequence[tuple[str, Callable[[Plan], str]]] = (
    ("devices", lambda p: f"{p.devices:,}"),
    ("mesh", lambda p: " x ".join(map(str, p.mesh))),
    ("global batch", lambda p: f"{p.batch_size:,}"),
    ("parameters", lambda p: _gib(p.parameters)),
    ("optimizer", lambda p: _gib(p.optimizer)),
    ("batch", lambda p: _gib(p.batch)),
    ("all other", lambda p: _gib(p.temporaries)),
    ("needed / usable", lambda p: f"{_gib(p.needed)} / {_gib(p.memory)}"),
    ("fits", lambda p: "yes" if p.fits else "NO"),
    ("model FLOPs", lambda p: _flops(p.model_flops)),
    ("FLOPs", lambda p: _flops(p.flops)),
    ("memory traffic", lambda p: _gib(p.traffic)),
    ("all-reduce", lambda p: _sent(p, "all-reduce")),
    ("all-gather", lambda p: _sent(p, "all-gather")),
    ("reduce-scatter", lambda p: _sent(p, "reduce-scatter")),
    ("all-to-all", lambda p: _sent(p, "all-to-all")),
    ("permute", lambda p: _sent(p, "collective-permute")),
    ("compute time", lambda p: _ms(p.seconds["compute"])),
    ("memory time", lambda p: _ms(p.seconds["memory"])),
    ("network time", lambda p: _ms(p.seconds["network"])),
    ("  not overlapped", lambda p: _ms(p.exposed)),
    ("roofline step", lambda p: f"{_ms(p.step_seconds)} ({p.bound})"),
    ("MFU allowed", lambda p: f"{p.mfu:.0%}"),
    ("pairs/s, at most", lambda p: f"{p.pairs_per_second:,.0f}"),
)
FROM_COMPILER = ROWS[[name for name, _ in ROWS].index("FLOPs") :]
"""Rows that are unknown of a program that its compiler refuses, because it does not fit into memory."""


def table(plans: Sequence[Plan]) -> str:
    """Returns a table with one column per plan; bytes, FLOPs and times are per device and step."""
    columns = [["per device", *(name for name, _ in ROWS)]]
    for plan in plans:
        name = f"{plan.slices} x {plan.topology}" if plan.slices > 1 else plan.topology
        shown = ("unknown" if plan.flops is None and row in FROM_COMPILER else row[1](plan) for row in ROWS)
        columns.append([name, *shown])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for first, *values in zip(*columns, strict=True):
        cells = (f"  {value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"{first:{widths[0]}}" + "".join(cells))
    return "\n".join(lines)


def operations(plan: Plan, count: int) -> str:
    """Returns a list of the operations of a plan that move the most bytes, with their runs per step and bytes."""
    lines = [f"{plan.topology}: the operations that move the most bytes"]
    for operation in plan.operations[:count]:
        runs = f"{operation.times:>8,.0f} x {operation.kind:14}"
        lines.append(f"{_gib(operation.bytes):>14} {runs} {operation.name[-80:]}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _sent(plan: "Plan", collective: str) -> str:
    """Returns the bytes that a collective sends, and how many of them leave the slice or the machine."""
    between = plan.between.get(collective)
    return _gib(plan.sent.get(collective, 0)) + (f" ({_gib(between)} out)" if between else "")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.1f} TFLOP"
