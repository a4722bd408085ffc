"""From the command to the first step: `python -m jaxclip.train` as a user starts it, its data prepared."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.benchmarks.timing import REPEATS, rounds
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.errors import UserError

FLAGS = {"preset": ("laptop", "of the towers"), "repeats": (3, REPEATS)}
FILE = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict(json.loads({!r}))\n"
POLL, PATIENCE = 0.01, 600.0  # seconds


def measure(preset: str, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Returns rows of median "seconds": importing what training needs, and from the command to the first step.

    That is until metrics.jsonl tells of the first step, once with nothing compiled before ("cold") and once with the
    programs that an earlier run kept ("compiled before"), in turns; "programs" tells how many each compiled and kept.
    """
    with tempfile.TemporaryDirectory(prefix="jaxclip_start_") as name:
        folder = Path(name)
        draw_catalogue(folder / "drawn", 300, 0)
        data = {"reader": "fashion_product_images", "path": str(folder / "drawn"), "prepared": str(folder / "prepared")}
        config = {"batch_size": 32, "steps": 1000, "log_every": 1, "model": {"preset": preset}}
        config |= {"data": data, "features": {"detector": "none"}}
        file = folder / "start.py"
        file.write_text("import json\n\n" + FILE.format(json.dumps(config)))
        kept = folder / "kept"
        _first_step(file, folder / "first", kept)  # prepares the data, and compiles
        programs = {"imports": 0, "cold": 0, "compiled before": 0}
        found: dict[str, list[float]] = {name: [] for name in programs}
        for number in rounds(repeats):
            found["imports"].append(_imports())
            for name, compiled in (("cold", folder / f"nothing{number}"), ("compiled before", kept)):
                before = _programs(compiled)
                found[name].append(_first_step(file, folder / f"{name}{number}", compiled))
                programs[name] = _programs(compiled) - before
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return [
        {"start": name, "preset": preset, "seconds": s, "time_ratio": s / medians["cold"], "programs": programs[name]}
        for name, s in medians.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements as lines for the terminal."""
    lines = [f"from the command to the first step, {rows[0]['preset']}", f"{'':18}{'seconds':>9}{'ratio':>7}"]
    return "\n".join(lines + [f"{row['start']:18}{row['seconds']:9.1f}{row['time_ratio']:7.2f}" for row in rows])


def _programs(compiled: Path) -> int:
    """Returns how many programs JAX has kept in a folder."""
    return len(list(compiled.glob("*-cache")))


def _imports() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jaxclip.training.run"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _first_step(file: Path, workdir: Path, compiled: Path) -> float:
    """Returns the seconds until the first step is told of, after which the process is ended."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-m", "jaxclip.train", f"--config={file}", f"--workdir={workdir}"]
    metrics, start = workdir / "metrics.jsonl", time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        try:
            while time.perf_counter() - start < PATIENCE:
                if metrics.exists() and metrics.read_text().endswith("\n"):
                    return time.perf_counter() - start
                if process.poll() is not None:
                    break
                time.sleep(POLL)
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        last = told.read().decode(errors="replace").strip().splitlines()[-1:]
    raise UserError(f"the run in {workdir} made no step: {' '.join(last)}")
