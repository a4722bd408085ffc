"""Tests that need a GPU: training throughput at the largest batch, compared with open_clip, and scaling of pictures."""

import functools
import glob
import importlib.util
import json
import os
import subprocess
import sys

import pytest

ON_GPU = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
BATCHES = tuple(2**power for power in range(13, 4, -1))


@functools.cache
def backend():
    """Returns the platform that JAX finds in a separate process, since this one is set to use CPUs."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return "cpu"
    program = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", program], env=ON_GPU, capture_output=True, text=True)
    return done.stdout.strip()


def benchmark_step(path, preset, batch, *, repeats=5):
    """Returns the rows by implementation and the table of the train_step benchmark; None if the batch does not fit."""
    arguments = [f"--preset={preset}", f"--batch={batch}", "--dtype=bfloat16", f"--repeats={repeats}", f"--json={path}"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxclip.bench", "train_step", *arguments], env=ON_GPU, capture_output=True, text=True
    )
    if done.returncode:
        assert "memory" in done.stderr.lower() or "RESOURCE_EXHAUSTED" in done.stderr, done.stderr
        return None
    rows = json.loads(path.read_text())["rows"]
    return {row["implementation"]: row for row in rows if row["measured"] == "train step"}, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["vit_b_32", "vit_b_16"])
def test_the_largest_batch_that_fits_a_gpu_is_measured_with_open_clip(tmp_path, preset):
    if backend() != "gpu":
        pytest.skip("there is no GPU that JAX can use")
    from jaxclip.benchmarks import train_step

    results = (benchmark_step(tmp_path / "step.json", preset, batch) for batch in BATCHES)
    rows, table = next(filter(None, results))
    print(table)  # pairs/s and MFU; shown by pytest -rP
    assert 0 < rows["jaxclip"]["mfu"] < 1 and rows["jaxclip"]["memory"] > 2**30
    peers = [name for name, modules in train_step.PEERS.items() if all(map(importlib.util.find_spec, modules))]
    assert rows.keys() == {"jaxclip", *peers}


SCALE = """
import time, jax, numpy as np
from functools import partial
from jaxclip.models import resampling
random = np.random.default_rng(0)
pictures = random.integers(0, 256, (256, 448, 448, 3), np.uint8), random.integers(200, 449, (256, 2), np.int32)
scale = jax.jit(partial(resampling.scale, size=224, filter="bicubic"))
on_gpu, on_cpu = jax.device_put(pictures, jax.devices("gpu")[0]), jax.device_put(pictures, jax.devices("cpu")[0])
actual, expected = np.asarray(scale(*on_gpu), int), np.asarray(scale(*on_cpu), int)
started = time.perf_counter()
jax.block_until_ready([scale(*on_gpu) for _ in range(10)])
print(f"{2560 / (time.perf_counter() - started):,.0f} pictures/s")
assert abs(actual - expected).max() <= 1, abs(actual - expected).max()
"""


def test_a_gpu_scales_pictures_as_a_cpu_does():
    if backend() != "gpu":
        pytest.skip("there is no GPU that JAX can use")
    done = subprocess.run([sys.executable, "-c", SCALE], env=ON_GPU, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
