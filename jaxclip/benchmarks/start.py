"""Time from the command `python -m jaxclip.train` to its first step, on prepared data."""

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

FLAGS = {"preset": ("laptop", "preset of the towers"), "repeats": (3, REPEATS)}
CONFIG_FILE = """import json

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(json.loads({!r}))
"""
POLL_SECONDS, TIMEOUT_SECONDS = 0.01, 600.0


def measure(preset: str, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Returns rows of median "seconds": of importing the training modules ("imports"), and of two kinds of start.

    A start is measured from the command until metrics.jsonl holds the first step: with an empty compilation cache
    ("cold"), and with the cache of an earlier run ("compiled before"). They run in turns. "programs" is the number of
    programs that the last start of each kind added to the cache, and "time_ratio" is the time divided by "cold"'s.
    """
    with tempfile.TemporaryDirectory(prefix="jaxclip_start_") as name:
        folder = Path(name)
        draw_catalogue(folder / "drawn", 300, 0)
        data = {"reader": "fashion_product_images", "path": str(folder / "drawn"), "prepared": str(folder / "prepared")}
        config = {"batch_size": 32, "steps": 1000, "log_every": 1, "model": {"preset": preset}}
        config |= {"data": data, "features": {"detector": "none"}}
        file = folder / "start.py"
        file.write_text(CONFIG_FILE.format(json.dumps(config)))
        filled_cache = folder / "filled"
        _time_first_step(file, folder / "first", filled_cache)  # prepares the data and fills the cache
        programs = {"imports": 0, "cold": 0, "compiled before": 0}
        seconds: dict[str, list[float]] = {name: [] for name in programs}
        for number in rounds(repeats):
            seconds["imports"].append(_time_imports())
            for name, cache in (("cold", folder / f"empty{number}"), ("compiled before", filled_cache)):
                before = _count_programs(cache)
                seconds[name].append(_time_first_step(file, folder / f"{name}{number}", cache))
                programs[name] = _count_programs(cache) - before
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return [
        {
            "start": name,
            "preset": preset,
            "seconds": median,
            "time_ratio": median / medians["cold"],
            "programs": programs[name],
        }
        for name, median in medians.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    lines = [f"from the command to the first step, {rows[0]['preset']}", f"{'':18}{'seconds':>9}{'ratio':>7}"]
    return "\n".join(lines + [f"{row['start']:18}{row['seconds']:9.1f}{row['time_ratio']:7.2f}" for row in rows])


def _count_programs(cache: Path) -> int:
    """Returns the number of programs in a folder of JAX's compilation cache."""
    return len(list(cache.glob("*-cache")))


def _time_imports() -> float:
    """Returns the seconds of a process that only imports the training modules."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import jaxclip.training.run"], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def _time_first_step(file: Path, workdir: Path, cache: Path) -> float:
    """Returns the seconds from the command until the first step is logged; the process is killed then.

    Raises:
      UserError: the process ended before, or took more than 600 seconds.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "jaxclip.train", f"--config={file}", f"--workdir={workdir}"]
    metrics, start = workdir / "metrics.jsonl", time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            while time.perf_counter() - start < TIMEOUT_SECONDS:
                if metrics.exists() and metrics.read_text().endswith("\n"):
                    return time.perf_counter() - start
                if process.poll() is not None:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        last_line = output.read().decode(errors="replace").strip().splitlines()[-1:]
    raise UserError(f"the training in {workdir} ended or timed out before its first step: {' '.join(last_line)}")
