"""Time, temporary memory and FLOP/s of InfoNCE and its gradient: dense, tiled, in strips and by open_clip."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.benchmarks.timing import REPEATS, available_memory, interleaved
from jaxclip.errors import UserError
from jaxclip.losses import contrastive, tiled
from jaxclip.losses.products import PRODUCTS

FLAGS = {
    "rows": (16384, "pairs in the batch"),
    "dimension": (512, "dimension of the embeddings"),
    "tile": (0, "rows and columns of a tile; 0 = chosen by back end"),
    "products": ("float32", "precision of the dense and the tiled loss's products, as in loss.products"),
    "repeats": (5, REPEATS),
}
SCALE = 1 / 0.07
STRIP = 256
OPEN_CLIP = ("torch", "open_clip")
OPEN_CLIP_MATRICES = 6
"""Estimated number of B x B arrays that PyTorch holds at a time: logits, log-probabilities and gradients, both ways."""


def measure(
    *, rows: int, dimension: int, tile: int = 0, products: str = "float32", repeats: int = 5
) -> list[dict[str, Any]]:
    """Returns a row for each implementation: temporaries in bytes, median seconds, FLOP/s, and the ratios to dense.

    The FLOPs are those of the dense loss's three products of B x B x D (B `rows`, D `dimension`) for every
    implementation, so that FLOP/s compare their speeds. An implementation whose temporaries would take 90% or more of
    the available main memory is not run, and its seconds are None. open_clip, whose temporaries are not reported but
    estimated, has no row in that case. Strips are left out if `rows` is not a multiple of 256.

    Raises:
      UserError: `products` is not one of PRODUCTS.
    """
    if products not in PRODUCTS:
        raise UserError(f"--products={products} must be one of {', '.join(PRODUCTS)}")
    images, texts = _unit_vectors(rows, dimension)
    arguments = (jnp.asarray(images), jnp.asarray(texts), jnp.float32(SCALE))
    losses = {
        "dense": lambda *args: contrastive.info_nce(*args, products=products)[0],
        "tiled": lambda *args: tiled.info_nce(*args, tile=tile, products=products)[0],
        "checkpointed strips": by_strips,
    }
    compiled = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
        for name, loss in losses.items()
        if name != "checkpointed strips" or rows % STRIP == 0
    }
    temporaries = {name: run.memory_analysis().temp_size_in_bytes for name, run in compiled.items()}
    calls: dict[str, Callable[[], object]] = {
        name: lambda run=run: jax.block_until_ready(run(*arguments))
        for name, run in compiled.items()
        if temporaries[name] < 0.9 * available_memory()
    }
    if all(map(importlib.util.find_spec, OPEN_CLIP)) and 4 * OPEN_CLIP_MATRICES * rows**2 < 0.9 * available_memory():
        calls["open_clip ClipLoss"] = _open_clip(images, texts)
    seconds = interleaved(calls, repeats)
    flops = 3 * 2 * rows**2 * dimension
    return [
        {
            "implementation": name,
            "rows": rows,
            "dimension": dimension,
            "temporaries": temporaries.get(name),
            "seconds": seconds.get(name),
            "flops_per_second": flops / seconds[name] if name in seconds else None,
            "time_ratio": _ratio(seconds, name),
            "temporaries_ratio": _ratio(temporaries, name),
        }
        for name in [*compiled, *(calls.keys() - compiled.keys())]
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    lines = [
        f"InfoNCE, value and gradient, {rows[0]['rows']:,} x {rows[0]['dimension']}",
        f"{'':22}{'seconds':>10}{'ratio':>8}{'temporaries':>14}{'ratio':>8}{'GFLOP/s':>9}",
    ]
    for row in rows:
        lines.append(
            f"{row['implementation']:22}{_format(row['seconds'], '.2f'):>10}{_format(row['time_ratio'], '.2f'):>8}"
            f"{_format(row['temporaries'], '.1f', 2**20, ' MiB'):>14}"
            f"{_format(row['temporaries_ratio'], '.4f'):>8}{_format(row['flops_per_second'], '.0f', 1e9):>9}"
        )
    return "\n".join(lines)


def by_strips(images: jax.Array, texts: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns InfoNCE, computed from strips of 256 rows in each direction; the backward pass computes them again."""

    def one_direction(queries: jax.Array, gallery: jax.Array) -> jax.Array:
        @jax.checkpoint
        def strip(rows: jax.Array) -> jax.Array:
            logits = scale * jnp.matmul(rows, gallery.T, precision=jax.lax.Precision.HIGHEST)  # (S, B)
            return jax.nn.logsumexp(logits, axis=1)

        return jax.lax.map(strip, queries.reshape(-1, STRIP, queries.shape[1])).mean()

    positives = scale * jnp.sum(images * texts, axis=1).mean()
    return 0.5 * (one_direction(images, texts) + one_direction(texts, images)) - positives


def _open_clip(images: np.ndarray, texts: np.ndarray) -> Callable[[], object]:
    """Returns a call of open_clip's ClipLoss and its gradient."""
    import torch

    # The module is loaded from its file, because importing the package needs torchvision, which the loss does not use.
    path = Path(importlib.util.find_spec("open_clip").origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sides = [torch.from_numpy(side.copy()).requires_grad_() for side in (images, texts)]
    scale = torch.tensor(SCALE, requires_grad=True)
    loss = module.ClipLoss()
    return lambda: torch.autograd.grad(loss(*sides, scale), [*sides, scale])


def _unit_vectors(rows: int, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((2, rows, dimension), np.float32)
    return tuple(vectors / np.linalg.norm(vectors, axis=2, keepdims=True))


def _ratio(values: dict[str, float], name: str) -> float | None:
    return values[name] / values["dense"] if name in values and "dense" in values else None


def _format(value: float | None, spec: str, unit: float = 1.0, suffix: str = "") -> str:
    return "-" if value is None else f"{value / unit:{spec}}{suffix}"
