"""Measure this machine: python -m jaxclip.bench NAME [--json=PATH]

loss     InfoNCE's value and gradient [--rows=16384] [--dimension=512] [--repeats=5]: implementations are run in turns;
         medians are shown, and ratios to the first
ranks    ranks and the best 20 of texts and pictures [--items=41446], beside faiss, open_clip, torchmetrics and a sort
rerank   second stages over the best 100 of 1,000 queries [--items=41446] [--candidates=100] [--dimension=128]
         [--batch-size=64] [--repeats=5]: medians, and ratios to the retrieval of these candidates
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxclip import command_line

Rows = list[dict[str, Any]]


def loss(arguments: Sequence[str]) -> tuple[Rows, str]:
    """Returns what `training.benchmarks.loss.measure` returns, and a table of it."""
    from jaxclip.training.benchmarks import loss as benchmark
    from jaxclip.training.progress import bar

    parser = argparse.ArgumentParser(prog="python -m jaxclip.bench loss")
    parser.add_argument("--rows", type=_positive, default=16384, help="pairs of the batch")
    parser.add_argument("--dimension", type=_positive, default=512, help="of the embeddings")
    parser.add_argument("--tile", type=_positive, default=benchmark.tiled.TILE, help="rows and columns of a tile")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed runs of each implementation")
    given = vars(parser.parse_args(arguments))
    rows = benchmark.measure(**given, progress=lambda runs: bar(runs, desc="measuring", unit="round"))
    lines = [
        f"InfoNCE, value and gradient, {given['rows']:,} x {given['dimension']}",
        f"{'':22}{'seconds':>10}{'ratio':>8}{'temporaries':>14}{'ratio':>8}{'GFLOP/s':>9}",
    ]
    for row in rows:
        lines.append(
            f"{row['implementation']:22}{_shown(row['seconds'], '.2f'):>10}{_shown(row['time_ratio'], '.2f'):>8}"
            f"{_shown(row['temporaries'], '.1f', 2**20, ' MiB'):>14}"
            f"{_shown(row['temporaries_ratio'], '.4f'):>8}{_shown(row['flops_per_second'], '.0f', 1e9):>9}"
        )
    return rows, "\n".join(lines)


def ranks(arguments: Sequence[str]) -> tuple[Rows, str]:
    """Returns what `retrieval.measure.measure` returns, and a table of it."""
    from jaxclip.retrieval import measure

    parser = argparse.ArgumentParser(prog="python -m jaxclip.bench ranks")
    parser.add_argument("--items", type=_positive, default=measure.ITEMS, help="texts, and as many pictures")
    rows = measure.measure(**vars(parser.parse_args(arguments)))
    return [{"implementation": name, **row} for name, row in rows.items()], measure.table(rows)


def rerank(arguments: Sequence[str]) -> tuple[Rows, str]:
    """Returns what `training.benchmarks.rerank.measure` returns, and a table of it."""
    from jaxclip.config.schema import Config, Rerank
    from jaxclip.training.benchmarks import rerank as benchmark
    from jaxclip.training.progress import bar

    stages = {
        "gated": Rerank(),
        "gated, hubness, image and attributes": Rerank(features="hubness,image,attributes"),
        "paper": Rerank(preset="paper"),
        "cross-attention": Rerank(preset="cross_attention", hidden=128),
    }
    parser = argparse.ArgumentParser(prog="python -m jaxclip.bench rerank")
    parser.add_argument("--items", type=_positive, default=41446, help="products of the gallery")
    parser.add_argument("--candidates", type=_positive, default=100, help="of each query")
    parser.add_argument("--dimension", type=_positive, default=128, help="of the embeddings")
    parser.add_argument("--batch-size", type=_positive, default=64, help="queries that are scored at a time")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed runs of each")
    given = vars(parser.parse_args(arguments))
    configs = {name: Config(rerank=stage) for name, stage in stages.items()}
    rows = benchmark.measure(configs, **given, progress=lambda runs: bar(runs, desc="measuring", unit="round"))
    lines = [
        f"{given['candidates']} candidates of {given['items']:,} products",
        f"{'':40}{'s per 1,000 queries':>20}{'ratio':>8}",
    ]
    lines += [f"{row['implementation']:40}{row['seconds']:>20.3f}{row['time_ratio']:>8.2f}" for row in rows]
    return rows, "\n".join(lines)


BENCHMARKS: dict[str, Callable[[Sequence[str]], tuple[Rows, str]]] = {"loss": loss, "ranks": ranks, "rerank": rerank}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark that is named; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxclip.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--json", type=Path, help="file for the results")
    given, rest = parser.parse_known_args(argv)
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json: {given.json.parent} is no folder")
    rows, table = BENCHMARKS[given.name](rest)
    print(f"\n{table}\n")
    if given.json:
        given.json.write_text(
            json.dumps({"benchmark": given.name, "machine": _machine(), "rows": rows}, indent=2) + "\n"
        )
        print(f"{'json':10}{given.json}")
    return 0


def _machine() -> dict[str, str]:
    import jax

    device = jax.devices()[0].device_kind
    return {"device": device, "devices": str(jax.device_count()), "host": platform.machine(), "jax": jax.__version__}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _shown(value: float | None, form: str, unit: float = 1.0, suffix: str = "") -> str:
    return "-" if value is None else f"{value / unit:{form}}{suffix}"


if __name__ == "__main__":
    command_line.reuse_memory()
    sys.exit(main(sys.argv[1:]))
