"""The re-ranker: network, loss, the tables that a training step reads, and scoring."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxclip.config import Config
from jaxclip.ranking.candidates import Candidates
from jaxclip.reranking import losses, networks
from jaxclip.reranking.cross_attention import CrossAttention, CrossAttentionConfig
from jaxclip.reranking.first_stage import IMAGE_TOKENS, Split
from jaxclip.reranking.networks import RerankerConfig
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.params import Params, make_model, replicated
from jaxclip.towers.sharding import place_shapes
from jaxclip.towers.trainable import Trainable, make_trainable
from jaxclip.training.optimizer import make_optimizer, make_schedule
from jaxclip.training.recipe import Recipe
from jaxclip.training.state import abstract_state
from jaxclip.training.step import make_step

MODELS: dict[str, type[nnx.Module]] = {**networks.PRESETS, "cross_attention": CrossAttention}
Tables = dict[str, Any]
"""Arrays of all lists and products, replicated on every device; see `make_tables`."""


@dataclass(frozen=True)
class Reranker:
    """A re-ranker, without the values of its parameters.

    Attributes:
      config: shape of the network.
      features: names of the features that the network reads.
      model: class of the network.
      graph: the network without its parameters.
      shapes: shape, dtype and sharding of each parameter.
      mesh: the mesh that it runs on.
      trainable: the parameters that are trained, with their factors of the learning rate.
    """

    config: RerankerConfig | CrossAttentionConfig
    features: tuple[str, ...]
    model: type[nnx.Module]
    graph: nnx.GraphDef
    shapes: Params
    mesh: Mesh
    trainable: Trainable


def make_reranker(config: Config, split: Split, *, mesh: Mesh, logit_scale: float) -> Reranker:
    """Returns the configured re-ranker for the features of a split, without allocating parameters.

    `logit_scale` is exp(logit scale) of the first stage.
    """
    names, model = feature_names(config), MODELS[config.rerank.preset]
    network = _network_config(config, split, names, logit_scale)
    graph, shapes = make_model(network, model)
    frozen = ((rf"^{networks.STATISTICS}$", 0.0),) if networks.STATISTICS in shapes else ()
    trainable = make_trainable(shapes, (*frozen, *config.optimizer.rates))
    return Reranker(network, names, model, graph, place_shapes(shapes, mesh), mesh, trainable)


def make_recipe(config: Config, model: Reranker, steps: int) -> Recipe:
    """Returns the recipe that trains this re-ranker for `steps` steps, without allocating arrays."""
    schedule = make_schedule(config.optimizer, steps)
    optimizer = make_optimizer(config.optimizer, schedule, model.shapes, model.trainable)
    state = abstract_state(model.shapes, optimizer, model.mesh, model.trainable)
    rerank = config.rerank
    loss = make_loss(model, loss=rerank.loss, negatives=rerank.negatives, sampled=rerank.sampled)
    return Recipe(optimizer, schedule, state, make_step(loss, optimizer, schedule, model.trainable, seed=config.seed))


def _network_config(
    config: Config, split: Split, names: tuple[str, ...], logit_scale: float
) -> RerankerConfig | CrossAttentionConfig:
    settings = config.rerank
    if settings.preset == "cross_attention":
        _, image_tokens, image_width = split.image_tokens.shape
        _, text_tokens, text_width = split.query_tokens.shape
        return CrossAttentionConfig(
            image_tokens=image_tokens,
            image_width=image_width,
            text_tokens=text_tokens,
            text_width=text_width,
            logit_scale=logit_scale,
            width=settings.hidden,
            layers=settings.layers,
            heads=settings.heads,
            dropout=settings.dropout,
        )
    return RerankerConfig(
        embedding=split.queries.shape[1],
        features=tuple((name, split.features[name].shape[1]) for name in names),
        logit_scale=logit_scale,
        hidden=settings.hidden,
        matching=settings.matching,
        dropout=settings.dropout,
        combine=settings.combine,
        batch_norm=settings.batch_norm,
    )


def feature_names(config: Config) -> tuple[str, ...]:
    """Returns the names of the features that the configured network reads."""
    fixed = {"paper": networks.Paper.FEATURES, "cross_attention": (IMAGE_TOKENS,)}
    if config.rerank.preset in fixed:
        return fixed[config.rerank.preset]
    return tuple(name.strip() for name in config.rerank.features.split(",") if name.strip())


def make_tables(split: Split, candidates: Candidates, model: Reranker, queries: np.ndarray) -> Tables:
    """Returns tables of the lists of N queries, replicated on every device, so that a batch is only row indices.

    A list holds the K candidates of a query. The keys are:
      "query": (N, D) embeddings, or (N, T, V) output tokens of the text tower for cross-attention (see `Split`).
      "items", "first_scores", "relevant": (N, K) the candidates of each query, their first-stage scores and relevance.
      "features", "present": as in `Split`, of all products, for the features that the network reads.

    Args:
      split: the products and queries.
      candidates: the candidates of all queries of the split.
      model: the re-ranker.
      queries: (N,) indices of queries of the split.
    """
    names = model.features
    tables = {
        "query": (split.query_tokens if IMAGE_TOKENS in names else split.queries)[queries],
        **_lists(candidates, queries),
        "features": {name: split.features[name] for name in names},
        "present": {name: split.present[name] for name in names},
    }
    return jax.device_put(tables, replicated(model.mesh))


def _lists(candidates: Candidates, queries: np.ndarray) -> Tables:
    """Returns the tables of `make_tables` that depend on the candidates."""
    return {
        "items": candidates.items[queries].astype(np.int32),
        "first_scores": candidates.scores[queries],
        "relevant": candidates.relevant[queries],
    }


def contrastive_tables(split: Split, model: Reranker, queries: np.ndarray) -> Tables:
    """Returns the additional tables of the contrastive loss, which scores queries with products of other lists.

    The keys are "embedding", (N, D) of the N `queries`, and "image", (G, D), and "group", (G,), of all G products.
    """
    groups = np.unique(split.groups, return_inverse=True)[1].astype(np.int32)
    tables = {"embedding": split.queries[queries], "image": split.images[split.main], "group": groups}
    return jax.device_put(tables, replicated(model.mesh))


def batch_rows(total: int, batch_size: int, seed: int, steps: range) -> Iterator[np.ndarray]:
    """Yields the row indices of each step's batch, (batch_size,) int32; every epoch has its own random order.

    Given the other arguments, a batch depends only on the number of its step, so a run can resume at any step.
    `total` is the number of rows that batches are drawn from.
    """
    epoch, order = -1, np.empty(0, np.int64)
    for step in steps:
        positions = step * batch_size + np.arange(batch_size)
        rows = np.empty(batch_size, np.int32)
        for number in np.unique(positions // total):
            if number != epoch:
                epoch, order = number, np.random.default_rng([seed & 0xFFFFFFFF, number]).permutation(total)
            inside = positions // total == number
            rows[inside] = order[positions[inside] % total]
        yield rows


def make_loss(model: Reranker, *, loss: str, negatives: str, sampled: int) -> Callable:
    """Returns loss(params, batch, rng) -> (value, metrics); a batch contains the tables and "rows", the rows to read.

    The contrastive loss replaces the lists by B x B pairs: each of the batch's B queries with one answer of every query
    of the batch. The metrics also contain the updated statistics of a network with batch normalisation.

    Args:
      model: the re-ranker.
      loss: a key of LOSSES.
      negatives: how the binary loss draws the non-relevant candidate (see `losses.sample_pair`).
      sampled: number of candidates of each list that the softmax and lambda losses draw in a step, at least one of them
        relevant; 0 uses all.
    """

    def compute(params: Params, batch: Tables, rng: jax.Array | None) -> tuple[jax.Array, dict[str, Any]]:
        network = nnx.merge(model.graph, params)
        query, *lists = take_lists(batch)
        model_rng, sampling_rng = (None, None) if rng is None else jax.random.split(rng)
        positions = None
        if loss == "binary":
            positions = losses.sample_pair(lists[-1], negatives, sampling_rng)  # (B, 2)
        elif loss == "contrastive":
            positions = losses.sample_candidates(lists[-1], 1, sampling_rng)  # (B, 1)
        elif sampled:
            positions = losses.sample_candidates(lists[-1], sampled, sampling_rng)  # (B, N)
        if positions is not None:
            lists = [jnp.take_along_axis(part, positions, axis=1) for part in lists]
        items, first_scores, relevant = _answers_of_batch(batch, lists[0][:, 0]) if loss == "contrastive" else lists
        features, present = look_up(batch, items)
        extra = {}
        if isinstance(network, networks.Paper):
            scores, statistics = network.train(query, first_scores, features, present, rng=model_rng)
            extra = {} if statistics is None else {"statistics": {networks.STATISTICS: statistics}}
        else:
            scores = network(query, first_scores, features, present, rng=model_rng)
        hit = jnp.take_along_axis(relevant, jnp.argmax(scores, axis=1)[:, None], axis=1)
        return LOSSES[loss](network.logits(scores), relevant), {"hit_at_1": jnp.mean(hit), **extra}

    return compute


LOSSES = {
    "softmax": losses.list_softmax,
    "lambda": losses.lambda_loss,
    "binary": losses.binary_cross_entropy,
    "contrastive": losses.contrastive,
}


def _answers_of_batch(batch: Tables, answers: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns items, first-stage scores and relevance (B, B) of every query with the answers (B,) of all queries."""
    first_scores = batch["embedding"][batch["rows"]] @ batch["image"][answers].T
    groups = batch["group"][answers]
    return jnp.broadcast_to(answers, first_scores.shape), first_scores, groups[:, None] == groups


def take_lists(batch: Tables) -> tuple[jax.Array, ...]:
    """Returns the queries (B, ...), and items, first-stage scores and relevance, (B, K) each, of the batch's rows."""
    return tuple(batch[name][batch["rows"]] for name in ("query", "items", "first_scores", "relevant"))


def look_up(batch: Tables, items: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns name -> feature, (B, K, ...) float32, of the products `items` (B, K), and name -> who has it, (B, K)."""
    features = {name: table[items].astype(jnp.float32) for name, table in batch["features"].items()}
    return features, {name: table[items] for name, table in batch["present"].items()}


class Scorer:
    """Scores the candidates of a split's queries with given parameters.

    All blocks of queries have the same shape, so that the program is compiled once. Only the first `count` of the Q
    queries are scored; 0 scores all.
    """

    def __init__(self, model: Reranker, split: Split, candidates: Candidates, *, batch_size: int, count: int = 0):
        self.count, multiple = count or len(split.queries), meshes.batch_multiple(model.mesh)
        self.size = -(-min(batch_size, self.count) // multiple) * multiple
        self.tables = make_tables(split, candidates, model, np.arange(self.count))
        self._mesh, self._sharding = model.mesh, meshes.batch_sharding(model.mesh)

        def score(params: Params, batch: Tables) -> jax.Array:
            query, items, first_scores, _ = take_lists(batch)
            return nnx.merge(model.graph, params)(query, first_scores, *look_up(batch, items))

        self._score = jax.jit(score, out_shardings=replicated(model.mesh))

    def among(self, candidates: Candidates) -> "Scorer":
        """Returns a scorer of other candidates, as many, of the same queries; it shares the compiled program."""
        scorer = copy.copy(self)
        lists = jax.device_put(_lists(candidates, np.arange(self.count)), replicated(self._mesh))
        scorer.tables = {**self.tables, **lists}
        return scorer

    def __call__(self, params: Params) -> np.ndarray:
        """Returns the re-ranker's scores, (Q, K) float32, or (count, K)."""
        running = []
        for start in range(0, self.count, self.size):
            rows = np.minimum(np.arange(start, start + self.size), self.count - 1).astype(np.int32)
            running.append(self._score(params, {"rows": jax.device_put(rows, self._sharding), **self.tables}))
        return np.concatenate([np.asarray(block) for block in running])[: self.count]
