"""Training steps that `bench device` measures, compares with the CPU's and traces. Needs no TensorFlow.

Every function runs in a process of its own and yields rows; see `device_parts`.
"""

import json
import os
import resource
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxclip.benchmarks.captions import captions
from jaxclip.benchmarks.device_parts import attempt
from jaxclip.benchmarks.limited import Row, command, name_of
from jaxclip.benchmarks.train_step import make_config, one_device_towers
from jaxclip.config import Config
from jaxclip.runtime import hardware
from jaxclip.towers.towers import Towers
from jaxclip.training.recipe import abstract_batch, make_recipe, step_model_flops
from jaxclip.training.state import TrainState, initial_state
from jaxclip.training.step import compile_step

ARCHIVE_BYTES = 16 * 2**20
"""Largest archive of a trace; tools that copy results from a machine often limit the size of a file."""


@dataclass
class Training:
    """A compiled training step on one device, its state, and a batch of random pictures with realistic captions."""

    config: Config
    towers: Towers
    step: Callable
    state: TrainState
    batch: dict[str, jax.Array]
    compile_seconds: float

    def run(self) -> jax.Array:
        """Takes one step, waits for it and returns its loss, which stays on the device."""
        self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return metrics["loss"]


def make_training(config: Config) -> Training:
    """Returns the configured training with the step that `train` compiles; raises UserError for a wrong config."""
    towers = one_device_towers(config)
    jax.set_mesh(towers.mesh)
    shapes, recipe = abstract_batch(config, towers), make_recipe(config, towers, config.steps)
    state = initial_state(towers.config, recipe.optimizer, recipe.state, towers.trainable, seed=config.seed)
    jax.block_until_ready(state)  # frees the temporary memory of initialisation before compiling
    start = time.perf_counter()
    step = compile_step(recipe.step, recipe.state, shapes)
    compile_seconds = time.perf_counter() - start
    rows, size, text = config.batch_size, towers.config.image.size, towers.config.text
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8),
        "text": captions(rows, text.context_length, text.end_token + 1),
        "group": np.arange(rows, dtype=np.int32),
    }
    placed = {name: jax.device_put(values, shapes[name].sharding) for name, values in batch.items()}
    return Training(config, towers, step, state, placed, compile_seconds)


def step(
    preset: str,
    pairs: int,
    steps: int,
    dtype: str,
    remat: str = "none",
    execution: str = "auto",
    attention: str = "auto",
    cached: bool = False,
) -> Iterator[Row]:
    """Yields the median seconds of `steps` training steps after two untimed ones, their MFU and peak memory.

    Compilation includes tracing; with `cached` the program may come from the cache in JAX_COMPILATION_CACHE_DIR, which
    tests set. `model_flops` and MFU are those of `recipe.step_model_flops`, over the peak of `dtype`; MFU is null if
    the device is unknown.
    """
    jax.config.update("jax_enable_compilation_cache", cached)
    config = make_config(preset, pairs, dtype)
    options = {"remat": remat, "execution": execution, "attention": attention}
    config = replace(config, model=replace(config.model, **options))
    fields = {"preset": preset, "pairs": pairs, "dtype": dtype, **options}
    yield attempt(fields, lambda: _measured(make_training(config), steps))


def _measured(training: Training, steps: int) -> Row:
    for _ in range(2):
        training.run()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = training.run()
        seconds.append(time.perf_counter() - start)
    median, device, config = float(np.median(seconds)), jax.devices()[0], training.config
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    flops, chip = step_model_flops(config, training.towers), hardware.chip(device)
    return {
        "compile_seconds": training.compile_seconds,
        "seconds": median,
        "slowest_seconds": max(seconds),
        "pairs_per_second": config.batch_size / median,
        "peak_memory": memory or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "temporaries": training.step.memory_analysis().temp_size_in_bytes,
        "model_flops": flops,
        "flops_per_second": flops / median,
        "mfu": flops / median / chip.peak(config.model.dtype) if chip else None,
        "loss": float(loss),
    }


def losses(preset: str, pairs: int, steps: int) -> Iterator[Row]:
    """Yields the losses of this device and of a CPU over the same steps, and the largest relative difference.

    Both train from one seed on one batch, in float32 with products of the highest precision. `first_difference` is that
    of the first step, before any update: rounding only. Updates magnify it, so `largest_difference` is larger.
    """
    arguments = {"preset": preset, "pairs": pairs, "steps": steps}

    def measure() -> Row:
        # The CPU's process is in the process group of this one, so that it is killed with it.
        run = command(name_of(training_losses), arguments)
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(run, env=environment, stdout=subprocess.PIPE) as reference:
            try:
                (here,) = training_losses(**arguments)
                output, _ = reference.communicate()
            finally:
                reference.kill()
        (cpu,) = map(json.loads, output.splitlines())
        if "error" in cpu:
            raise RuntimeError(f"on the CPU: {cpu['error']}")
        ours, expected = np.asarray(here["losses"]), np.asarray(cpu["losses"])
        difference = np.abs(ours - expected) / np.abs(expected)
        return {
            "first_difference": float(difference[0]),
            "largest_difference": float(difference.max()),
            "losses": here["losses"],
            "cpu_losses": cpu["losses"],
        }

    yield attempt({**arguments, "dtype": "float32"}, measure)


def training_losses(preset: str, pairs: int, steps: int) -> Iterator[Row]:
    """Yields one row with the losses of `steps` training steps in float32; raises ValueError if one is not finite."""
    jax.config.update("jax_default_matmul_precision", "highest")
    training = make_training(make_config(preset, pairs, "float32"))
    values = [float(training.run()) for _ in range(steps)]
    if not np.isfinite(values).all():
        raise ValueError(f"a loss is not finite: {values}")
    yield {"losses": values}


def trace(preset: str, pairs: int, steps: int, dtype: str, archive: str) -> Iterator[Row]:
    """Yields a row that describes the profiler's trace of `steps` training steps, packed as `archive` (tar.gz)."""

    def measure() -> Row:
        training = make_training(make_config(preset, pairs, dtype))
        for _ in range(2):
            training.run()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for number in range(steps):
                    with jax.profiler.StepTraceAnnotation("train", step_num=number):
                        training.run()
            return pack(Path(folder), Path(archive))

    yield attempt({"preset": preset, "pairs": pairs, "dtype": dtype, "steps": steps}, measure)


def pack(folder: Path, archive: Path, limit: int = ARCHIVE_BYTES) -> dict[str, Any]:
    """Packs the files of a folder as a tar.gz of at most `limit` bytes and returns its path, bytes, and what it lacks.

    While the archive is larger, the largest file is left out; "left_out_files" lists these with their bytes.
    """
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    left_out = []
    while True:
        with tarfile.open(archive, "w:gz") as packed:
            for path in files:
                packed.add(path, path.relative_to(folder))
        if archive.stat().st_size <= limit or not files:
            break
        largest = files.pop()
        left_out.append({"file": str(largest.relative_to(folder)), "bytes": largest.stat().st_size})
    return {
        "archive": str(archive),
        "bytes": archive.stat().st_size,
        "files": len(files),
        "left_out_files": left_out,
    }
