"""Time of a re-ranker over the candidates of a thousand queries, compared with the time of retrieving them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclip.benchmarks.timing import REPEATS, interleaved
from jaxclip.config import Config
from jaxclip.config.rerank_section import Rerank
from jaxclip.ranking.candidates import Candidates, retrieve
from jaxclip.reranking.first_stage import IMAGE_TOKENS, Split
from jaxclip.reranking.reranker import Scorer, feature_names, make_recipe, make_reranker
from jaxclip.runtime.mesh import make_mesh
from jaxclip.training.state import initial_state

FLAGS = {
    "items": (41446, "products in the gallery"),
    "candidates": (100, "candidates per query"),
    "dimension": (128, "dimension of the embeddings"),
    "batch": (64, "queries per batch of the re-ranker"),
    "repeats": (5, REPEATS),
}
RERANKERS = {
    "gated": {},
    "gated, hubness, image and attributes": {"features": "hubness,image,attributes"},
    "paper": {"preset": "paper"},
    "cross-attention": {"preset": "cross_attention", "hidden": 128},
}
"""Implementation -> the fields of config.rerank that differ from their defaults."""
QUERIES, TOKEN_QUERIES, LOGIT_SCALE = 1000, 40, 20.0
"""Re-rankers that read tokens are timed on TOKEN_QUERIES only, because QUERIES would take minutes on a CPU."""
TOKENS, WIDTH = {"image": 16, "text": 16}, 128
"""Numbers of tokens, and their width, of the preset `tiny` for pictures of 64 pixels."""
FEATURE_WIDTHS = {"hubness": 3, "colour": 45, "geometry": 6, "texture": 14, "attributes": 150}


def measure(*, items: int, candidates: int, dimension: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Returns one row for retrieving the candidates of 1,000 queries, and one for each of RERANKERS.

    A row holds "seconds", the median time per 1,000 queries (25 times that of 40 queries for cross-attention), and
    "time_ratio", that time divided by retrieval's. All features are random. When a timed call of a re-ranker starts,
    its feature tables are on the device; when it ends, the scores are in main memory.
    """
    configs = {name: Config(rerank=Rerank(**fields)) for name, fields in RERANKERS.items()}
    split = _split(items, dimension)
    owners, gallery = split.groups[split.owners], split.images

    def retrieve_candidates() -> Candidates:
        return retrieve(split.queries, gallery, owners, split.groups, candidates)

    mesh, retrieved = make_mesh(-1, 1, 1), retrieve_candidates()
    calls: dict[str, Callable[[], object]] = {"retrieval": retrieve_candidates}
    for name, config in configs.items():
        calls[name] = _make_call(config, split, retrieved, mesh, batch)
    seconds = interleaved(calls, repeats)
    for name, config in configs.items():
        seconds[name] *= QUERIES / _query_count(config)
    return [
        {
            "implementation": name,
            "items": items,
            "candidates": candidates,
            "dimension": dimension,
            "seconds": median,
            "time_ratio": median / seconds["retrieval"],
        }
        for name, median in seconds.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of `measure` as a table for the terminal."""
    lines = [
        f"{rows[0]['candidates']} candidates of {rows[0]['items']:,} products",
        f"{'':40}{'s per 1,000 queries':>20}{'ratio':>8}",
    ]
    lines += [f"{row['implementation']:40}{row['seconds']:>20.3f}{row['time_ratio']:>8.2f}" for row in rows]
    return "\n".join(lines)


def _make_call(
    config: Config, split: Split, retrieved: Candidates, mesh: Mesh, batch_size: int
) -> Callable[[], np.ndarray]:
    """Returns a call that scores the candidates with a re-ranker that has random parameters."""
    model = make_reranker(config, split, mesh=mesh, logit_scale=LOGIT_SCALE)
    recipe = make_recipe(config, model, 1)
    with jax.set_mesh(mesh):
        state = initial_state(model.config, recipe.optimizer, recipe.state, model.trainable, seed=0, model=model.model)
    score = Scorer(model, split, retrieved, batch_size=batch_size, count=_query_count(config))

    def run() -> np.ndarray:
        with jax.set_mesh(mesh):
            return score(state.params)

    return run


def _query_count(config: Config) -> int:
    return TOKEN_QUERIES if IMAGE_TOKENS in feature_names(config) else QUERIES


def _split(items: int, dimension: int) -> Split:
    """Returns a gallery of random features, with QUERIES queries near their products."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32)

    image = normal(items, dimension)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    owners = np.arange(QUERIES) % items
    queries = image[owners] + normal(QUERIES, dimension) / dimension**0.5
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    image_tokens = normal(items, TOKENS["image"], WIDTH).astype(np.float16)
    features = {name: normal(items, width) for name, width in FEATURE_WIDTHS.items()}
    features |= {"image": image, "crop": image, "colour_embedding": image, IMAGE_TOKENS: image_tokens}
    return Split(
        groups=np.arange(items),
        images=image,
        crops=image,
        picture_owners=np.arange(items),
        colour_names=image[:1],
        columns={},
        attributes=np.full(items, "{}"),
        captions=np.full(QUERIES, ""),
        queries=queries,
        owners=owners,
        query_tokens=normal(QUERIES, TOKENS["text"], WIDTH).astype(np.float16),
        image_tokens=image_tokens,
        features=features,
        present={name: np.ones(items, bool) for name in features},
    )
