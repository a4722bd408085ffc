"""Measure this machine: python -m jaxclip.bench NAME [--json=PATH]

train_step   a training step and the two encoders, compared with open_clip and transformers in PyTorch
input        the input pipeline, compared with Pillow in threads, webdataset and grain
start        time from the command to the first step, with an empty and with a filled compilation cache
loss         value and gradient of InfoNCE: dense, tiled, in strips and by open_clip
ranks        ranks and top 20 in both directions, compared with faiss, open_clip, torchmetrics and a full sort
search       `python -m jaxclip.search` under 1, 8 and 64 clients, compared with faiss and transformers in PyTorch
rerank       re-rankers over the candidates of queries, per 1,000 queries, compared with retrieving the candidates

Implementations take turns. Each benchmark prints medians (times, or requests per second) and ratios between the rows.
`NAME --help` lists the flags of a benchmark. Other libraries are measured if installed: pip install -e '.[bench]'
"""

import argparse
import importlib
import json
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxclip import cli
from jaxclip.errors import UserError
from jaxclip.runtime import startup

NAMES = ("train_step", "input", "start", "loss", "ranks", "rerank", "search")
"""Modules of jaxclip.benchmarks. Each has FLAGS (name -> default value and help text), `measure(**flags)`, which
returns one dict per measured implementation, and `table`, which formats these dicts for the terminal."""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark named on the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxclip.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
        kind = _positive if isinstance(default, int) else str
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} ({default})")
    flags = vars(parser.parse_args(benchmark_arguments))
    # SIGTERM must raise, so that context managers stop the processes that the benchmark started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        rows = module.measure(**flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USER_ERROR
    print(f"\n{module.table(rows)}\n")
    if arguments.json:
        results = {"benchmark": arguments.name, "machine": _machine(), "rows": rows}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{'json':10}{arguments.json}")
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


if __name__ == "__main__":
    startup.reuse_memory()
    sys.exit(main(sys.argv[1:]))
