"""How long the ranks take on this machine, beside what else computes them here."""

import importlib.util
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.retrieval.ranks import both_ways, ranks
from jaxclip.retrieval.relevance import Relevance

ITEMS, DIMENSION, TOP, SMALL = 41_446, 512, 20, 4096
NOISE = 8.0  # ranks then spread from 1 to thousands
FLAGS = {"items": (ITEMS, "texts, and as many pictures")}
NAMED = ("implementation", "seconds")


def measure(items: int = ITEMS) -> list[dict[str, Any]]:
    """Returns rows of "implementation", "seconds", "items", ... of a search of `items` texts in as many pictures.

    Embeddings are 512 wide, each text its picture with noise, seed 0. Peers are measured where they are installed:
    faiss's IndexFlatIP at full size; open_clip's metric, torchmetrics and a full numpy sort, which hold the whole score
    matrix, at 4,096. jaxclip compiles before the clock starts. "bfloat16" tells how far its ranks are from float32's,
    and "memory" by how many MB the first search raised the peak beyond what was there (the embeddings, the libraries).
    """
    texts, images = _embeddings(items)
    relevance = Relevance.from_groups(np.arange(items), np.arange(items))
    before = _peak()
    found, _ = both_ways(texts, images, relevance, top_k=TOP)
    rows: dict[str, Any] = {"memory": {"items": items, "MB": round((_peak() - before) / 2**20)}}

    def add(name: str, call: Callable[[], Any], size: int, *, warm: bool = True) -> None:
        if warm:
            call()
        start = time.perf_counter()
        call()
        rows[name] = {"seconds": round(time.perf_counter() - start, 3), "items": size}

    add(f"both ways, top {TOP}", lambda: both_ways(texts, images, relevance, top_k=TOP), items, warm=False)
    add("both ways, ranks alone", lambda: both_ways(texts, images, relevance), items)
    add(f"one way, top {TOP}", lambda: ranks(texts, images, relevance, top_k=TOP), items)
    half = ranks(texts, images, relevance, dtype=jnp.bfloat16)
    add("one way, bfloat16", lambda: ranks(texts, images, relevance, dtype=jnp.bfloat16), items, warm=False)
    rows["one way, bfloat16"] |= {
        "ranks changed": float((half.ranks != found.ranks).mean()),
        "hit@10 changed": float((half.ranks <= 10).mean() - (found.ranks <= 10).mean()),
    }
    if _installed("faiss"):
        add(f"two searches of faiss, top {TOP}", lambda: _faiss(texts, images), items, warm=False)
    size = min(items, SMALL)
    few, some = texts[:size], images[:size]
    one_to_one = Relevance.from_groups(np.arange(size), np.arange(size))
    add("both ways, small", lambda: both_ways(few, some, one_to_one), size)
    add("numpy sort, small", lambda: _sort(few, some), size)
    if _installed("open_clip_train", "torchvision"):
        add("open_clip, small", lambda: _open_clip(few, some), size)
    if _installed("torchmetrics", "lightning_utilities"):
        add("torchmetrics hit rate, small", lambda: _torchmetrics(few[:512], some), 512, warm=False)
    return [{"implementation": name, **row} for name, row in rows.items()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements as lines for the terminal."""
    lines = [f"{jax.device_count()} device(s) of kind {jax.devices()[0].device_kind}, JAX {jax.__version__}"]
    for row in rows:
        figures = ", ".join(f"{key} {value:,.4g}" for key, value in row.items() if key not in NAMED)
        seconds = f"{row['seconds']:9.2f} s   " if "seconds" in row else " " * 14
        lines.append(f"{row['implementation']:34}{seconds}{figures}")
    return "\n".join(lines)


def _embeddings(items: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.standard_normal((items, DIMENSION), np.float32)
    texts = images + NOISE * random.standard_normal(images.shape, np.float32)
    for side in (texts, images):
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    return texts, images


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


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
