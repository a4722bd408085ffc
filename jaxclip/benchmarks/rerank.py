"""How long a second stage takes to order the candidates of a thousand queries, beside what retrieves them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclip.benchmarks.timing import REPEATS, interleaved
from jaxclip.config import Config
from jaxclip.ranking import candidates as second_stage
from jaxclip.reranking import reranker as reranking
from jaxclip.reranking.first_stage import IMAGE_TOKENS, Split
from jaxclip.reranking.reranker import Scorer
from jaxclip.runtime.mesh import make_mesh
from jaxclip.training.state import initial_state

FLAGS = {
    "items": (41446, "products of the gallery"),
    "candidates": (100, "of each query"),
    "dimension": (128, "of the embeddings"),
    "batch": (64, "queries that are scored at a time"),
    "repeats": (5, REPEATS),
}
QUERIES, FEW, LOGIT_SCALE = 1000, 40, 20.0
"""FEW queries are scored by what reads tokens: a thousand take minutes on a CPU."""
TOKENS, WIDTH = {"image": 16, "text": 16}, 128
"""Of the `tiny` towers on pictures of 64 pixels."""
SIZES = {"hubness": 3, "colour": 45, "geometry": 6, "texture": 14, "attributes": 150}


def measure(
    configs: Mapping[str, Config],
    *,
    items: int,
    candidates: int,
    dimension: int,
    batch: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Returns a row for the retrieval of 1,000 queries' candidates among the items, and one for each of the configs.

    Each has its median seconds, per 1,000 queries, and its ratio to retrieval. Everything is random; a second
    stage begins with its tables on the device and ends with the scores in main memory.
    """
    split = _split(items, dimension)
    owners, gallery = split.groups[split.owners], split.features["image"]

    def retrieve() -> second_stage.Candidates:
        return second_stage.retrieve(split.queries, gallery, owners, split.groups, candidates)

    mesh, retrieved = make_mesh(-1, 1, 1), retrieve()
    calls: dict[str, Callable[[], object]] = {"retrieval": retrieve}
    for name, config in configs.items():
        calls[name] = _second_stage(config, split, retrieved, mesh, batch)
    seconds = interleaved(calls, repeats)
    for name, config in configs.items():
        seconds[name] *= QUERIES / _queries(config)
    return [
        {
            "implementation": name,
            "items": items,
            "candidates": candidates,
            "dimension": dimension,
            "seconds": taken,
            "time_ratio": taken / seconds["retrieval"],
        }
        for name, taken in seconds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the measurements as lines for the terminal."""
    lines = [
        f"{rows[0]['candidates']} candidates of {rows[0]['items']:,} products",
        f"{'':40}{'s per 1,000 queries':>20}{'ratio':>8}",
    ]
    lines += [f"{row['implementation']:40}{row['seconds']:>20.3f}{row['time_ratio']:>8.2f}" for row in rows]
    return "\n".join(lines)


def _second_stage(config: Config, split: Split, retrieved: second_stage.Candidates, mesh: Mesh, batch_size: int):
    model = reranking.make_reranker(config, split, mesh=mesh, logit_scale=LOGIT_SCALE)
    recipe = reranking.make_recipe(config, model, 1)
    with jax.set_mesh(mesh):
        state = initial_state(model.config, recipe.optimizer, recipe.state, model.trainable, seed=0, model=model.model)
    score = Scorer(model, split, retrieved, batch_size=batch_size, count=_queries(config))

    def run() -> np.ndarray:
        with jax.set_mesh(mesh):
            return score(state.params)

    return run


def _queries(config: Config) -> int:
    return FEW if IMAGE_TOKENS in reranking.features(config) else QUERIES


def _split(items: int, dimension: int) -> Split:
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    image = drawn(items, dimension)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    owners = np.arange(QUERIES) % items
    queries = image[owners] + drawn(QUERIES, dimension) / dimension**0.5
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    features = {name: drawn(items, size) for name, size in SIZES.items()}
    features |= {"image": image, "crop": image, "colour_embedding": image}
    features[IMAGE_TOKENS] = drawn(items, TOKENS["image"], WIDTH).astype(np.float16)
    return Split(
        np.arange(items),
        features,
        {name: np.ones(items, bool) for name in features},
        np.full(items, "{}"),
        np.full(QUERIES, ""),
        queries,
        owners,
        drawn(QUERIES, TOKENS["text"], WIDTH).astype(np.float16),
    )
