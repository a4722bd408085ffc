"""Measure this machine: python -m jaxclip.bench NAME [--json=PATH]

train_step   a training step and the two encoders, compared with open_clip and transformers in PyTorch
input        the input pipeline, compared with Pillow in threads, webdataset and grain
start        time from the command to the first step, with an empty and with a filled compilation cache
loss         value and gradient of InfoNCE: dense, tiled, in strips and by open_clip
ranks        ranks and top 20 in both directions, compared with faiss, open_clip, torchmetrics and a full sort
search       `python -m jaxclip.search` under 1, 8 and 64 clients, compared with faiss and transformers in PyTorch
rerank       re-rankers over the candidates of queries, per 1,000 queries, compared with retrieving the candidates
device       a GPU or TPU within --minutes=8: products, training steps, attention, gradients, losses, ranks, a trace

Implementations take turns. Each benchmark prints medians (times, or requests per second) and ratios between the rows.
`NAME --help` lists the flags of a benchmark. Other libraries are measured if installed: pip install -e '.[bench]'
"""

import argparse
import importlib
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxclip import cli
from jaxclip.errors import UserError
from jaxclip.runtime import files, startup

NAMES = ("train_step", "input", "start", "loss", "ranks", "rerank", "search", "device")
"""Modules of jaxclip.benchmarks. Each has FLAGS (name -> default value and help text), `measure(**flags)`, which
returns or yields one dict per measured implementation, and `table`, which formats these dicts for the terminal. The
JSON file is written after each of the dicts. `machine`, if there is one, returns its description of the machine from
the dicts so far."""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark named on the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxclip.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=argv[:1] not in [[name] for name in NAMES],  # `NAME --help` is for the parser of the benchmark
    )
    parser.add_argument("name", choices=sorted(NAMES), help="the benchmark to run")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    arguments, benchmark_arguments = parser.parse_known_args(argv)
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: the folder {arguments.json.parent} does not exist")
    with startup.quiet_imports():
        module = importlib.import_module(f"jaxclip.benchmarks.{arguments.name}")
    parser = argparse.ArgumentParser(prog=f"python -m jaxclip.bench {arguments.name}")
    for name, (default, meaning) in module.FLAGS.items():
        kind = positive_integer if isinstance(default, int) else str
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} ({default})")
    flags = vars(parser.parse_args(benchmark_arguments))
    if "json" in flags:
        flags["json"] = str(arguments.json or "")
    # SIGTERM must raise, so that context managers stop the processes that the benchmark started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run(module, arguments.name, flags, arguments.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USER_ERROR
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(module: ModuleType, name: str, flags: dict[str, Any], path: Path | None) -> int:
    """Measures, writes the JSON file after each row and prints the table, also of the rows before an interruption."""
    rows: list[dict[str, Any]] = []
    measured = module.measure(**flags)
    machine = getattr(module, "machine", _machine)
    try:
        for row in measured:
            rows.append(row)
            if path:
                files.write_json(path, {"benchmark": name, "machine": machine(rows), "rows": rows})
    finally:
        if rows:
            print(f"\n{module.table(rows)}\n")
            if path:
                print(f"{'json':10}{path}")
    return 0


def _machine(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    import jax

    device = jax.devices()[0].device_kind
    return {"device": device, "devices": str(jax.device_count()), "host": platform.machine(), "jax": jax.__version__}


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    startup.reuse_memory()
    sys.exit(main(sys.argv[1:]))
