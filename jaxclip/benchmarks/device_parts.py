"""Operations that `bench device` measures: products, attention, gradients, losses and ranks. Needs no TensorFlow.

Every function runs in a process of its own and yields one row per measurement. A measurement that fails is a row with
"error". Times exclude compilation and transfers, unless stated otherwise.
"""

import importlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.benchmarks.captions import captions
from jaxclip.benchmarks.limited import Row, one_line
from jaxclip.losses import contrastive, tiled
from jaxclip.models import cpu
from jaxclip.models.attention import attend, choose
from jaxclip.models.embedding import embed_tokens
from jaxclip.ranking.ranks import both_ways
from jaxclip.ranking.relevance import Relevance
from jaxclip.runtime import mesh as meshes

ROUNDS, ROUND_SECONDS, MOST_CALLS = 5, 0.1, 100
"""Timed rounds of each measurement, the least seconds of a round, and the most calls in it."""
PACKAGES = ("jaxlib", "flax", "optax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
CUDA_PACKAGES = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas")
HEAD = 64  # features of an attention head in every ViT preset
SCALE = 1 / 0.07  # logit scale of the losses


def run(function: str, sizes: Row, toy: Row) -> Iterator[Row]:
    """Returns the rows of function(**sizes), where the toy sizes replace others if JAX has only CPUs.

    `function` is "module:function". Its module is imported here, because those of training steps take seconds.
    """
    if jax.default_backend() == "cpu":
        sizes = sizes | toy
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(**sizes)


def attempt(fields: Row, measure: Callable[[], Row]) -> Row:
    """Returns the fields and what measure() returns, or the fields and "error" if it raises an exception."""
    try:
        return {**fields, **measure()}
    except Exception as error:
        return {**fields, "error": one_line(error)}


def timed(function: Callable, *arguments: Any) -> Row:
    """Returns compile_seconds, seconds and temporaries (bytes) of a function of arrays that are on the device.

    `seconds` is the median of ROUNDS rounds. In a round, the host waits only for the last of several calls, so that
    dispatching a call overlaps with computing the one before.
    """
    start = time.perf_counter()
    run = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(run(*arguments))
    calls = max(1, min(MOST_CALLS, round(ROUND_SECONDS / _seconds(run, arguments, 1))))
    seconds = float(np.median([_seconds(run, arguments, calls) for _ in range(ROUNDS)]))
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"compile_seconds": compile_seconds, "seconds": seconds, "temporaries": temporaries}


def _seconds(run: Callable, arguments: Sequence[Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def machine(matrix: int, copied: int) -> Iterator[Row]:
    """Yields versions, the FLOP/s of a bfloat16 product of two square matrices, and the bandwidth of a copy.

    `matrix` is the side of the matrices and `copied` the number of float32 values, which are read and written.
    """
    yield attempt({"measured": "versions"}, versions)
    keys = jax.random.split(jax.random.key(0))
    # Random values: products of zeros take less power, so that some devices compute them faster.
    sides = [jax.random.normal(key, (matrix, matrix), jnp.bfloat16) for key in keys]

    def product() -> Row:
        row = timed(jnp.matmul, *sides)
        return row | {"flops_per_second": 2 * matrix**3 / row["seconds"]}

    def copy() -> Row:
        row = timed(lambda x: x + 1, jnp.ones(copied, jnp.float32))
        return row | {"bytes_per_second": 2 * 4 * copied / row["seconds"]}

    yield attempt({"measured": f"product of {matrix} x {matrix} matrices", "dtype": "bfloat16"}, product)
    yield attempt({"measured": "copy", "bytes": 4 * copied}, copy)


def versions() -> Row:
    """Returns the versions of libraries and drivers, and kind, number and memory (bytes) of the devices."""
    device, installed = jax.devices()[0], {}
    for name in (*PACKAGES, *CUDA_PACKAGES):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": _nvidia_driver(),
        "python": platform.python_version(),
        "host": platform.machine(),
        "processors": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "jax": jax.__version__,
        **installed,
    }


def _nvidia_driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.split("\n")[0].strip() or None


def attention(shapes: Sequence[tuple[int, int, bool, int]]) -> Iterator[Row]:
    """Yields forward pass, and forward and backward pass, of attention in bfloat16: XLA's and the device's fused one.

    A shape is (tokens, heads, whether the mask is causal, examples). The rows of the fused one also hold "difference",
    the largest absolute difference of a result from XLA's: of outputs, which are of the order of 1, or of gradients.
    """
    fused = choose(jnp.bfloat16, queries=2, head=HEAD)
    for tokens, heads, causal, examples in shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        shape = (examples, tokens, heads, HEAD)
        *qkv, slope = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        forward_flops = 2 * 2 * examples * heads * tokens**2 * HEAD  # a causal mask saves none of XLA's

        def forward(implementation, q, k, v, causal=causal):
            return attend(q, k, v, causal=causal, implementation=implementation)

        def both(implementation, q, k, v, slope, forward=forward):
            return jax.vjp(partial(forward, implementation), q, k, v)[1](slope)

        for implementation in ("xla", *({"cudnn", "pallas"} & {fused})):
            for measured, function, arguments, flops in (
                ("forward", forward, qkv, forward_flops),
                ("forward and backward", both, (*qkv, slope), 3 * forward_flops),
            ):
                row = {"measured": measured, "implementation": implementation, "tokens": tokens, "heads": heads}
                row |= {"causal": causal, "examples": examples}
                yield attempt(row, partial(_attention, function, arguments, flops, implementation))


def _attention(function: Callable, arguments: Sequence[jax.Array], flops: float, implementation: str) -> Row:
    row = timed(partial(function, implementation), *arguments)
    row["flops_per_second"] = flops / row["seconds"]
    if implementation != "xla":

        def largest(*arguments):
            pairs = zip(*(jax.tree.leaves(function(i, *arguments)) for i in (implementation, "xla")), strict=True)
            return jnp.max(jnp.stack([jnp.max(jnp.abs(x - y)) for x, y in pairs]))

        row["difference"] = float(jax.jit(largest)(*arguments))
    return row


def token_embedding(examples: int, length: int, vocabulary: int, width: int) -> Iterator[Row]:
    """Yields the gradient of the table of token embeddings with realistic (see `captions`) and with uniform ids.

    The forms are "scatter", that of a plain look-up in a table that is cast to `dtype`, and "ours", that of the text
    tower, whose sums are float32; "reached" also leaves out what follows a caption's end token.
    """
    uniform = np.random.default_rng(0).integers(0, vocabulary, (examples, length), np.int32)
    end = vocabulary - 1
    for name, ids in (("realistic", captions(examples, length, vocabulary)), ("uniform", uniform)):
        inside = np.arange(length) <= np.argmax(ids == end, axis=1)[:, None]
        for dtype in ("bfloat16", "float32"):
            table = jnp.zeros((vocabulary, width), jnp.float32)
            slope = jax.random.normal(jax.random.key(0), (examples, length, width), dtype)
            forms = {
                "scatter": lambda table, ids, reached, dtype=dtype: jnp.take(table.astype(dtype), ids, axis=0),
                "ours": lambda table, ids, reached, dtype=dtype: embed_tokens(table, ids, end_token=end, dtype=dtype),
                "reached": partial(embed_tokens, end_token=end, dtype=dtype),
            }
            share = float(np.bincount(ids.ravel()).max() / ids.size)
            fields = {"ids": name, "dtype": dtype, "tokens": ids.size, "width": width, "most_frequent": share}
            for form, look_up in forms.items():
                if name == "uniform" and form == "reached":
                    continue

                def gradient(table, ids, reached, slope, look_up=look_up):
                    return jax.vjp(lambda table: look_up(table, ids, reached=reached), table)[1](slope)[0]

                arguments = table, jnp.asarray(ids), jnp.asarray(inside), slope
                yield attempt({"form": form, **fields}, partial(timed, gradient, *arguments))


def bias_gradient(rows: int, width: int) -> Iterator[Row]:
    """Yields the gradient of a bias.

    The forms are "sum", XLA's sum over rows in `dtype`, "float32", the one in `models.linear`, and "product", the
    product with a vector of ones in `models.cpu`.
    """
    forms = {
        "sum": lambda slope: jax.lax.reduce(slope, jnp.zeros((), slope.dtype), jax.lax.add, (0,)),
        "float32": lambda slope: jnp.sum(slope, 0, jnp.float32),
        "product": lambda slope: cpu.sum_rows(slope, 1, jnp.float32),
    }
    for dtype in ("bfloat16", "float32"):
        slope = jax.random.normal(jax.random.key(0), (rows, width), dtype)
        for form, gradient in forms.items():

            def measure(gradient=gradient, slope=slope) -> Row:
                row = timed(gradient, slope)
                return row | {"bytes_per_second": slope.nbytes / row["seconds"]}

            yield attempt({"form": form, "dtype": dtype, "rows": rows, "width": width}, measure)


def loss(pairs: int, dimension: int, tiles: Sequence[int], products: Sequence[str]) -> Iterator[Row]:
    """Yields value and gradient of InfoNCE on one device: for each precision tiled, with tiles of each size, and dense.

    FLOPs are those of the dense loss's three products of pairs x pairs x dimension for both implementations.
    """
    jax.set_mesh(meshes.make_mesh(1, 1, 1, jax.devices()[:1]))
    arguments = (*_related(pairs, dimension), np.float32(SCALE))
    arguments = [jnp.asarray(argument) for argument in arguments]
    kinds = [*(("tiled", tile) for tile in tiles), ("dense", None)]
    for precision, (implementation, tile) in itertools.product(products, kinds):
        function = contrastive.info_nce if tile is None else partial(tiled.info_nce, tile=tile)
        function = partial(function, products=precision)

        def measure(function=function) -> Row:
            row = timed(jax.value_and_grad(lambda *args: function(*args)[0], argnums=(0, 1, 2)), *arguments)
            return row | {"flops_per_second": 3 * 2 * pairs**2 * dimension / row["seconds"]}

        settings = {"implementation": implementation, "tile": tile, "products": precision}
        yield attempt(settings | {"pairs": pairs, "dimension": dimension}, measure)


def ranks(items: int, dimension: int, top: int, products: Sequence[str]) -> Iterator[Row]:
    """Yields the ranks and best items of both directions, for each precision of the products.

    `first_seconds` is the time of the first call, with compilation, and `seconds` the median of three more. Both
    include the transfers of embeddings and results, which every call makes.
    """
    images, texts = _related(items, dimension)
    pairs = Relevance.from_groups(np.arange(items), np.arange(items))
    for precision in products:

        def measure(precision=precision) -> Row:
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                result, _ = both_ways(texts, images, pairs, top_k=top, products=precision)
                seconds.append(time.perf_counter() - start)
            median = float(np.median(seconds[1:]))
            return {
                "first_seconds": seconds[0],
                "seconds": median,
                "flops_per_second": 2 * items**2 * dimension / median,
                "hit@10": float((result.ranks <= 10).mean()),
            }

        yield attempt({"products": precision, "items": items, "dimension": dimension, "top": top}, measure)


def _related(rows: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns unit vectors of images and texts, where a text's vector is that of its image with noise."""
    random = np.random.default_rng(0)
    images = random.standard_normal((rows, dimension), np.float32)
    texts = images + 8 * random.standard_normal(images.shape, np.float32)
    return tuple(side / np.linalg.norm(side, axis=1, keepdims=True) for side in (images, texts))
