"""Measure this machine: python -m jaxclip.bench NAME [--json=PATH]

train_step   a training step, and encoding pictures and captions, beside open_clip and transformers in PyTorch
input        the input pipeline, beside Pillow in threads, webdataset and grain
start        from the command to the first step, with nothing compiled before and with everything
loss         InfoNCE's value and gradient: dense, tiled and by open_clip
ranks        ranks and the best 20 of texts and pictures, beside faiss, open_clip, torchmetrics and a sort
search       `python -m jaxclip.search` under 1, 8 and 64 clients, beside faiss and transformers in PyTorch
rerank       second stages over the candidates of 1,000 queries, beside the retrieval of these

Implementations are run in turns; medians are shown, and ratios to the first. NAME --help tells more flags. The peers
that are installed take part: pip install -e '.[bench]'
"""

import argparse
import importlib
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxclip
from jaxclip import cli, config
from jaxclip.config.schema import Config, Rerank
from jaxclip.errors import UserError
from jaxclip.runtime import startup

CLIP = {"image_size": 224, "context_length": 77, "vocab_size": 49408}
"""The data of the ViT presets; the small ones take the defaults."""
ROOM = "jaxclip.benchmarks"
NAMES = ("train_step", "input", "start", "loss", "ranks", "rerank", "search")
BENCHMARKS = {name: f"{ROOM}.{name}" for name in NAMES}
"""Name -> a module with FLAGS (name -> default and meaning), `measure`, which takes them and returns rows, and their
`table`."""
SECOND_STAGES = {
    "gated": {},
    "gated, hubness, image and attributes": {"features": "hubness,image,attributes"},
    "paper": {"preset": "paper"},
    "cross-attention": {"preset": "cross_attention", "hidden": 128},
}


def training(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of `train_step` with a configuration for those that are parts of one."""
    preset, batch, dtype = (flags.pop(name) for name in ("preset", "batch", "dtype"))
    data = CLIP if preset.startswith("vit") else {}
    model = {"preset": preset, "dtype": dtype}
    return {"config": config.build({"steps": 1000, "batch_size": batch, "data": data, "model": model}), **flags}


def reranking(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of `rerank` with the configurations of second stages to measure."""
    configs = {name: Config(rerank=Rerank(**stage)) for name, stage in SECOND_STAGES.items()}
    return {"configs": configs, **flags}


def searching(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags of `search` with the searcher and the configuration of its workdir."""
    if not flags["workdir"]:
        raise UserError("--workdir is missing: give the folder of a run")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU the server is beside it
    own = config.load_config(Path(flags["workdir"]))
    searcher = jaxclip.load(flags["workdir"], flags["gallery"] or None, say=cli.say)
    return {"searcher": searcher, "config": own, **flags}


CONFIGURED = {"train_step": training, "rerank": reranking, "search": searching}
"""Name -> what adds to its flags what a room below the configuration cannot make."""


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
    with startup.quiet_imports():
        module = importlib.import_module(BENCHMARKS[given.name])
    parser = argparse.ArgumentParser(prog=f"python -m jaxclip.bench {given.name}")
    for name, (default, meaning) in module.FLAGS.items():
        kind = _positive if isinstance(default, int) else str
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} ({default})")
    flags = vars(parser.parse_args(rest))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is ended too
    try:
        rows = module.measure(**CONFIGURED.get(given.name, dict)(flags))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USER_ERROR
    print(f"\n{module.table(rows)}\n")
    if given.json:
        written = {"benchmark": given.name, "machine": _machine(), "rows": rows}
        given.json.write_text(json.dumps(written, indent=2) + "\n")
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


if __name__ == "__main__":
    startup.reuse_memory()
    sys.exit(main(sys.argv[1:]))
