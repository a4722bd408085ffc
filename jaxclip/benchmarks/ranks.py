"""Time of the exact ranks and top k, compared with other implementations."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.benchmarks.timing import REPEATS, interleaved
from jaxclip.ranking.layout import TILES
from jaxclip.ranking.ranks import both_ways, ranks
from jaxclip.ranking.relevance import Relevance
from jaxclip.runtime import compiler

ITEMS, DIMENSION, TOP = 41_446, 512, 20
SMALL, FEW = 4096, 512  # items of the small comparisons, and texts of the smallest
NOISE = 8.0  # spreads the ranks from 1 to thousands
FLAGS = {"items": (ITEMS, "number of texts, and of pictures"), "repeats": (3, REPEATS)}
COLUMNS = ("implementation", "seconds")
"""Fields of a row that `table` shows in columns; it lists the other fields after them."""
ONE_WAY_BFLOAT16 = "one way, bfloat16"
ONE_WAY_3X, BOTH_WAYS_3X = f"one way, top {TOP}, bfloat16_3x", f"both ways, top {TOP}, bfloat16_3x"
FAISS, OPEN_CLIP, TORCHMETRICS = f"two searches of faiss, top {TOP}", "open_clip, small", "torchmetrics, few texts"
PEERS = {
    FAISS: ("faiss",),
    OPEN_CLIP: ("open_clip_train", "torchvision"),
    TORCHMETRICS: ("torchmetrics", "lightning_utilities"),
}
"""Implementation -> the packages it needs in addition to this package's."""


def measure(items: int = ITEMS, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Returns a row for each way of ranking texts against pictures: "seconds", "items" (the texts) and "time_ratio".

    Embeddings have 512 dimensions; a text's embedding is its picture's with noise (seed 0). Implementations run in
    turns after one warm-up call, and "seconds" is the median of `repeats` calls. Peers are measured if they are
    installed: faiss's IndexFlatIP at full size, which is `items` texts and pictures; open_clip's metric, torchmetrics
    and a full numpy sort, which hold the complete score matrix, at 4,096 items (torchmetrics with 512 texts).

    "time_ratio" is the time divided by that of the first row of the same size: "both ways, top 20", "both ways, small"
    or "one way, few texts". The one-way rows in bfloat16 and bfloat16_3x also hold the share of ranks that differ from
    float32's, and their hit@10 minus float32's. The row "memory" holds the peak MB (2^20 bytes) of the first search,
    including compilation, in addition to the embeddings and the libraries; it needs Linux's /proc.
    """
    texts, images = _embeddings(items)
    relevance = _pairs(items)
    jax.devices()
    before = _resident(peak=False)
    exact, _ = both_ways(texts, images, relevance, top_k=TOP)
    memory = {"items": items, "MB": round((_resident(peak=True) - before) / 2**20)}
    rows: dict[str, Any] = {"memory": memory}
    # The first implementation of each group is this package's; the others in the group are compared with it.
    groups = [(items, _at_full_size(texts, images)), *_at_small_size(texts[:SMALL], images[:SMALL])]
    calls = {name: call for _, group in groups for name, call in group.items() if _installed(*PEERS.get(name, ()))}
    seconds = interleaved(calls, repeats)
    for count, group in groups:
        ours = next(iter(group))
        for name in group.keys() & seconds.keys():
            rows[name] = {"seconds": seconds[name], "items": count, "time_ratio": seconds[name] / seconds[ours]}
    for name, products in ((ONE_WAY_BFLOAT16, "bfloat16"), (ONE_WAY_3X, "bfloat16_3x")):
        rounded = ranks(texts, images, relevance, products=products).ranks
        rows[name] |= {
            "ranks changed": float((rounded != exact.ranks).mean()),
            "hit@10 changed": float((rounded <= 10).mean() - (exact.ranks <= 10).mean()),
        }
    return [{"implementation": name, **rows[name]} for name in ("memory", *calls)]


def _at_full_size(texts: np.ndarray, images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Returns the calls at full size, this package's reference first."""
    pairs = _pairs(len(texts))
    return {
        f"both ways, top {TOP}": lambda: both_ways(texts, images, pairs, top_k=TOP),
        "both ways, ranks alone": lambda: both_ways(texts, images, pairs),
        f"one way, top {TOP}": lambda: ranks(texts, images, pairs, top_k=TOP),
        BOTH_WAYS_3X: lambda: both_ways(texts, images, pairs, top_k=TOP, products="bfloat16_3x"),
        ONE_WAY_3X: lambda: ranks(texts, images, pairs, top_k=TOP, products="bfloat16_3x"),
        ONE_WAY_BFLOAT16: lambda: ranks(texts, images, pairs, products="bfloat16"),
        "the product alone": lambda: _product(texts, images),
        FAISS: lambda: _faiss(texts, images),
    }


def _at_small_size(texts: np.ndarray, images: np.ndarray) -> list[tuple[int, dict[str, Callable[[], Any]]]]:
    """Returns (number of texts, calls) for the metrics of all texts and for the hit rate of a few texts."""
    pairs, few = _pairs(len(texts)), texts[:FEW]
    few_pairs = Relevance.from_groups(np.arange(len(few)), np.arange(len(images)))
    metrics = {
        "both ways, small": lambda: both_ways(texts, images, pairs),
        OPEN_CLIP: lambda: _open_clip(texts, images),
        "numpy sort, small": lambda: _sort(texts, images),
    }
    hit_rate = {
        "one way, few texts": lambda: ranks(few, images, few_pairs, top_k=TOP),
        TORCHMETRICS: lambda: _torchmetrics(few, images),
    }
    return [(len(texts), metrics), (len(few), hit_rate)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as lines for the terminal."""
    lines = [f"{jax.device_count()} device(s) of kind {jax.devices()[0].device_kind}, JAX {jax.__version__}"]
    for row in rows:
        figures = ", ".join(f"{key} {value:,.4g}" for key, value in row.items() if key not in COLUMNS)
        seconds = f"{row['seconds']:9.2f} s   " if "seconds" in row else " " * 14
        lines.append(f"{row['implementation']:34}{seconds}{figures}")
    absent = PEERS.keys() - {row["implementation"] for row in rows}
    lines += [f"{name:34}left out: needs {' and '.join(PEERS[name])}" for name in PEERS if name in absent]
    return "\n".join(lines)


def _embeddings(items: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.standard_normal((items, DIMENSION), np.float32)
    texts = images + NOISE * random.standard_normal(images.shape, np.float32)
    for side in (texts, images):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    return texts, images


def _resident(*, peak: bool) -> int:
    """Returns the bytes of main memory that this process uses now, or the peak since the last call without `peak`."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _pairs(items: int) -> Relevance:
    return Relevance.from_groups(np.arange(items), np.arange(items))


def _product(texts: np.ndarray, images: np.ndarray) -> None:
    """Computes all scores, block by block, and discards them: the least that an exact search in float32 must do."""
    tile = TILES[compiler.backend()]
    for first in range(0, len(texts), tile):
        jax.block_until_ready(_scores(texts[first : first + tile], images))


@jax.jit
def _scores(texts: jax.Array, images: jax.Array) -> jax.Array:
    return jnp.matmul(texts, images.T, precision=jax.lax.Precision.HIGHEST)


def _faiss(texts: np.ndarray, images: np.ndarray) -> None:
    import faiss

    for queries, gallery in ((texts, images), (images, texts)):
        index = faiss.IndexFlatIP(gallery.shape[1])
        index.add(gallery)
        index.search(queries, TOP)


def _sort(texts: np.ndarray, images: np.ndarray) -> None:
    scores = texts @ images.T
    for matrix in (scores, scores.T):
        order = np.argsort(-matrix, axis=1)
        (order == np.arange(len(order))[:, None]).argmax(axis=1)


def _open_clip(texts: np.ndarray, images: np.ndarray) -> None:
    import torch
    from open_clip_train.train import get_clip_metrics

    get_clip_metrics(torch.from_numpy(images), torch.from_numpy(texts), torch.tensor(1.0))


def _torchmetrics(texts: np.ndarray, images: np.ndarray) -> None:
    import torch
    from torchmetrics.retrieval import RetrievalHitRate

    scores = torch.from_numpy(texts @ images.T)
    target = torch.zeros(scores.shape, dtype=torch.bool)
    target.fill_diagonal_(True)
    indexes = torch.arange(len(scores))[:, None].expand_as(scores)
    RetrievalHitRate(top_k=TOP)(scores.flatten(), target.flatten(), indexes.flatten())
