"""Time of a training step and of the two encoders, compared with open_clip and transformers in PyTorch."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxclip.benchmarks.captions import captions
from jaxclip.benchmarks.timing import REPEATS, rounds
from jaxclip.benchmarks.workers import Worker
from jaxclip.config import Config, build
from jaxclip.models.clip import CLIPConfig
from jaxclip.planning.fit import Vocabulary
from jaxclip.runtime import compiler, hardware
from jaxclip.runtime.flops import model_flops
from jaxclip.towers.params import Params, cast_kernels
from jaxclip.towers.towers import Towers, make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe, step_model_flops
from jaxclip.training.state import initial_state
from jaxclip.training.step import compile_step

FLAGS = {
    "preset": ("vit_b_32", "preset of the towers"),
    "batch": (32, "pairs per step"),
    "dtype": ("float32", "type of the computation: float32 or bfloat16"),
    "repeats": (5, REPEATS),
}
OURS = "jaxclip"
PEERS = {"open_clip": ("torch", "torchvision", "open_clip"), "transformers": ("torch", "transformers")}
"""Function of the module `peers` -> the packages it needs."""
MEASURED = ("train step", "images", "texts")
MATRIX = 2048  # side of the square matrices whose product sets the "limit"
VIT_DATA = {"image_size": 224, "context_length": 77, "vocab_size": 49408}
"""Fields of config.data for the ViT presets; smaller presets use the defaults."""


def measure(*, preset: str, batch: int, dtype: str, repeats: int = 5) -> list[dict[str, Any]]:
    """Returns a row for each of MEASURED and each implementation: this package and the installed PEERS.

    Each implementation has a separate process. They run in turns after one warm-up call each. This package's encoders
    read parameters whose kernels are already cast to `dtype`, as in `Encoders`.

    A row holds:
      seconds: median time of `repeats` calls.
      per_second: pairs, pictures or captions per second.
      time_ratio: `seconds` divided by this package's.
      flops_per_second: model FLOPs (see `recipe.step_model_flops`) divided by `seconds`, for every implementation.
      limit: FLOP/s of the fastest product of two 2048 x 2048 matrices of `dtype` in any of the processes.
      mfu: `flops_per_second` as a share of the device's peak for `dtype`; absent if the peak is unknown.
      memory: the process's peak bytes: of device memory if there is an accelerator, else of main memory.
    """
    config = make_config(preset, batch, dtype)
    peers = [name for name, packages in PEERS.items() if all(map(importlib.util.find_spec, packages))]
    seconds: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(OURS, f"{__name__}:ours", config))]
        shape, flops, peak = workers[0].run("description")[1]
        for name in peers:
            make = f"jaxclip.benchmarks.peers:{name}"
            workers.append(stack.enter_context(Worker(name, make, shape, config.batch_size)))
        for call in (*MEASURED, "product"):
            for worker in workers:
                worker.run(call)
        for _ in rounds(repeats):
            for call in (*MEASURED, "product"):
                for worker in workers:
                    seconds.setdefault((worker.name, call), []).append(worker.run(call)[0])
        memory = {worker.name: worker.run("memory")[1] or worker.peak_memory() for worker in workers}
    medians = {key: float(np.median(values)) for key, values in seconds.items()}
    limit = 2 * MATRIX**3 / min(min(values) for (_, call), values in seconds.items() if call == "product")
    return [
        {
            "measured": call,
            "implementation": name,
            "preset": config.model.preset,
            "rows": config.batch_size,
            "seconds": medians[name, call],
            "per_second": config.batch_size / medians[name, call],
            "time_ratio": medians[name, call] / medians[OURS, call],
            "flops_per_second": flops[call] / medians[name, call],
            "limit": limit,
            "memory": memory[name],
            **({"mfu": flops[call] / medians[name, call] / peak} if peak else {}),
        }
        for call in MEASURED
        for name in memory
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    first = rows[0]
    lines = [
        f"{first['preset']}, batches of {first['rows']}; the limit: {first['limit'] / 1e9:,.0f} GFLOP/s",
        f"{'':12}{'':14}{'seconds':>9}{'rows/s':>9}{'ratio':>7}{'of limit':>10}{'peak memory':>13}",
    ]
    for row in rows:
        line = (
            f"{row['measured']:12}{row['implementation']:14}{row['seconds']:9.3f}{row['per_second']:9,.1f}"
            f"{row['time_ratio']:7.2f}{row['flops_per_second'] / row['limit']:10.0%}{row['memory'] / 2**20:9,.0f} MiB"
        )
        lines.append(line + (f"   MFU {row['mfu']:.0%}" if "mfu" in row else ""))
    return "\n".join(lines)


def make_config(preset: str, batch: int, dtype: str) -> Config:
    """Returns the configuration of the measured training; raises UserError if there is no such preset or type."""
    data = VIT_DATA if preset.startswith("vit") else {}
    model = {"preset": preset, "dtype": dtype}
    return build({"steps": 1000, "batch_size": batch, "data": data, "model": model})


def ours(config: Config) -> dict[str, Callable[[], Any]]:
    """Returns the calls of this package by name: those in MEASURED and those that describe them.

    "train step" is the step that `train` compiles, "images" and "texts" are the two encoders, "product" is the matrix
    product that sets the limit, "description" and "memory" report shapes and peak memory.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers' processes share the GPU's memory
    towers, device = one_device_towers(config), jax.devices()[0]
    chip = hardware.chip(device)
    jax.set_mesh(towers.mesh)
    shapes, recipe = abstract_batch(config, towers), make_recipe(config, towers, config.steps)
    state = initial_state(towers.config, recipe.optimizer, recipe.state, towers.trainable, seed=config.seed)
    jax.block_until_ready(state)  # frees the temporary memory of initialisation before compiling
    step = compile_step(recipe.step, recipe.state, shapes)
    batch = {name: jax.device_put(rows, shapes[name].sharding) for name, rows in _batch(config, towers.config).items()}
    options = compiler.towers()
    encode_image, encode_text = (jax.jit(encode, compiler_options=options) for encode in _encoders(towers))
    dtype = jnp.dtype(config.model.dtype)
    square = jnp.ones((MATRIX, MATRIX), dtype)
    product = jax.jit(jnp.matmul)

    @cache
    def cast_params() -> Params:
        """Returns the parameters with kernels in `dtype`; other leaves are copied, because the step donates them."""
        cast = cast_kernels(state.params, config.model.dtype)
        return jax.tree.map(lambda leaf: leaf if leaf.dtype == dtype else jnp.copy(leaf), cast)

    def params() -> Params:
        return state.params if dtype == jnp.float32 else cast_params()

    def train() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return {
        "description": lambda: (towers.config, _flops(config, towers), chip.peak(config.model.dtype) if chip else None),
        "images": lambda: np.asarray(encode_image(params(), batch["image"])).sum(),
        "texts": lambda: np.asarray(encode_text(params(), batch["text"])).sum(),
        "train step": train,
        "product": lambda: float(product(square, square).block_until_ready()[0, 0]),
        "memory": lambda: (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def one_device_towers(config: Config) -> Towers:
    """Returns the configured towers on one device, for a vocabulary whose last id is the end token."""
    vocabulary = Vocabulary(config.data.vocab_size, config.data.vocab_size - 1)
    return make_towers(config, make_preprocess(config), vocabulary, devices=jax.devices()[:1])


def _encoders(towers: Towers) -> tuple[Callable, Callable]:
    """Returns the functions of parameters and a batch that encode pictures and captions."""
    return (
        lambda params, pixels: nnx.merge(towers.graph, params).encode_image(pixels),
        lambda params, tokens: nnx.merge(towers.graph, params).encode_text(tokens),
    )


def _flops(config: Config, towers: Towers) -> dict[str, float]:
    """Returns the model FLOPs of each of MEASURED (see `recipe.step_model_flops`)."""
    batch, (image, text) = abstract_batch(config, towers), _encoders(towers)
    with jax.set_mesh(towers.mesh):
        traced = {
            "images": jax.make_jaxpr(image)(towers.shapes, batch["image"]),
            "texts": jax.make_jaxpr(text)(towers.shapes, batch["text"]),
        }
    encoders = {name: model_flops(jaxpr) for name, jaxpr in traced.items()}
    return {"train step": step_model_flops(config, towers), **encoders}


def _batch(config: Config, shape: CLIPConfig) -> dict[str, np.ndarray]:
    """Returns a batch of random pictures with captions as long, and with ids as frequent, as real ones."""
    random = np.random.default_rng(0)
    rows, size = config.batch_size, shape.image.size
    return {
        "image": random.integers(0, 256, (rows, size, size, 3), np.uint8),
        "text": captions(rows, shape.text.context_length, shape.text.end_token + 1),
        "group": np.arange(rows, dtype=np.int32),
    }
