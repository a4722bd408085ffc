"""Re-rankers that score a query's candidates from stored features of the products: `Gated` and `Paper`."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from jaxclip.models.transformer import dropout, example_keys, split_each

SHARED_SPACE = ("image", "crop")
"""Features in the towers' embedding space; `Gated` also reads their elementwise product with the query's embedding."""


@dataclass(frozen=True)
class RerankerConfig:
    """The shape of a `Gated` or `Paper` re-ranker.

    Attributes:
      embedding: D, dimension of the first stage's embeddings.
      features: (name, S) of each feature that the network reads, in order; S is the number of its values.
      logit_scale: exp(logit scale) of the first stage, which turns its cosines into logits.
      hidden: H, width of the query's hidden layer in `Gated`, from which gates and matches are computed.
      matching: M, width of the layer in `Gated` that compares a query with a feature of a candidate.
      dropout: share of hidden units that training sets to zero.
      combine: how `Paper` combines the embeddings of crop and colour: "add" or "concatenate".
      batch_norm: whether `Paper` normalises its hidden layers over the batch.
    """

    embedding: int
    features: tuple[tuple[str, int], ...]
    logit_scale: float
    hidden: int = 256
    matching: int = 64
    dropout: float = 0.1
    combine: str = "add"
    batch_norm: bool = False


class Match(nnx.Module):
    """Computes how well a feature of K candidates matches each of B queries: (B, K), all 0 before training."""

    def __init__(self, size: int, config: RerankerConfig, *, rngs: nnx.Rngs):
        self.query = nnx.Linear(config.hidden, config.matching, rngs=rngs)
        self.candidate = nnx.Linear(size, config.matching, rngs=rngs)
        self.out = nnx.Linear(config.matching, 1, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.dropout = config.dropout

    def __call__(self, query: Float[Array, "B H"], x: Float[Array, "B K S"], rng: Array | None) -> Array:
        query, x = self.query(query)[:, None], self.candidate(x)  # (B, 1, M), (B, K, M)
        hidden = jax.nn.gelu(query * x + query + x, approximate=True)
        return self.out(dropout(hidden, self.dropout, rng))[..., 0]


class Gated(nnx.Module):
    """Adds one term per feature to the first-stage score, weighted by a gate that is computed from the query.

    score = first-stage score + sum over features f of gate_f(q) * (match_f(q, x_f) - mean of match_f) / s, where q is
    the query, x_f the candidate's feature and s `RerankerConfig.logit_scale`. The mean is over the query's candidates
    that have the feature; for other candidates the term is 0. Before training every match is 0, so the scores equal the
    first-stage scores bit for bit.
    """

    def __init__(self, config: RerankerConfig, *, rngs: nnx.Rngs):
        self.query = nnx.Linear(config.embedding, config.hidden, rngs=rngs)
        self.norm = nnx.LayerNorm(config.hidden, rngs=rngs)
        self.gate = nnx.Linear(
            config.hidden, len(config.features), kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )
        self.matches = nnx.Dict(
            {
                name: Match(size + config.embedding * (name in SHARED_SPACE), config, rngs=rngs)
                for name, size in config.features
            }
        )
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(config.logit_scale)))
        self.config = config

    def __call__(
        self,
        query: Float[Array, "B D"],
        first_scores: Float[Array, "B K"],
        features: Mapping[str, Float[Array, "B K S"]],
        present: Mapping[str, Bool[Array, "B K"]],
        *,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B K"]:
        """Returns the scores of the K candidates of each of B queries, on the scale of the first-stage scores.

        Args:
          query: unit vectors of the queries.
          first_scores: first-stage scores of the candidates.
          features: name -> feature of each candidate.
          present: name -> whether each candidate has the feature.
          rng: random key for dropout; None disables dropout.
        """
        return first_scores + self.added(query, features, present, rng=rng)[1].sum(axis=1)

    def added(
        self,
        query: Float[Array, "B D"],
        features: Mapping[str, Float[Array, "B K S"]],
        present: Mapping[str, Bool[Array, "B K"]],
        *,
        rng: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B F"], Float[Array, "B F K"]]:
        """Returns the gate of each of F features, from 0 to 2, and the term that it adds to each candidate's score."""
        names = [name for name, _ in self.config.features]
        count = len(names) + 1
        rngs = [None] * count if rng is None else split_each(example_keys(rng, len(query)), count)
        # The entries of a unit vector get smaller with its dimension; scaling makes them of order 1, like other inputs.
        wide = query * self.config.embedding**0.5  # (B, D)
        hidden = jax.nn.gelu(self.norm(self.query(wide)), approximate=True)
        hidden = dropout(hidden, self.config.dropout, rngs[-1])  # (B, H)
        gates = 2.0 * jax.nn.sigmoid(self.gate(hidden))  # (B, F)
        matches = []
        for number, name in enumerate(names):
            x = features[name]
            if name in SHARED_SPACE:
                x = x * self.config.embedding**0.5
                x = jnp.concatenate([x, wide[:, None] * x], axis=-1)  # (B, K, 2D)
            matches.append(_centred(self.matches[name](hidden, x, rngs[number]), present[name]))  # (B, K)
        return gates, gates[..., None] * jnp.stack(matches, axis=1) / self.config.logit_scale

    def logits(self, scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """Returns the logits for a loss: the scores times exp(logit scale), where the logit scale is a parameter."""
        return scores * jnp.exp(self.logit_scale[...])


def _centred(match: Float[Array, "B K"], present: Bool[Array, "B K"]) -> Float[Array, "B K"]:
    """Returns each match minus its mean over the list's candidates that have the feature; 0 for other candidates."""
    count = jnp.maximum(present.sum(axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(present, match, 0.0), axis=1, keepdims=True) / count
    return jnp.where(present, match - mean, 0.0)


HIDDEN = (512, 256, 64)
STATISTICS = "statistics"
MOMENTUM, EPSILON = 0.9, 1e-5


class Paper(nnx.Module):
    """The network of the fit-aware paper (sections 3 and 5), which computes the logit that a candidate is relevant.

    The paper is "One size does not fit all: Improving Fashion Recommendation relevance via fit-aware Neural
    Re-ranking". The input is the query's embedding, concatenated with the sum of the embeddings of crop and dominant
    colour or with both of them (`combine`). The network has hidden layers of 512, 256 and 64 units with ReLU, dropout
    and Kaiming-uniform initial weights. It uses neither the whole picture nor the first-stage score. A missing crop is
    a zero vector; the paper does not say how it represents one.

    Attributes:
      statistics: running means, then running variances, of all hidden layers; gradients do not train them. They exist
        only with `batch_norm`.
    """

    FEATURES = ("crop", "colour_embedding")

    def __init__(self, config: RerankerConfig, *, rngs: nnx.Rngs):
        parts = 2 if config.combine == "add" else 1 + len(self.FEATURES)
        sizes = (config.embedding * parts, *HIDDEN)
        uniform = nnx.initializers.he_uniform()
        self.layers = nnx.List(
            [
                nnx.Linear(before, after, kernel_init=uniform, rngs=rngs)
                for before, after in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.out = nnx.Linear(HIDDEN[-1], 1, kernel_init=uniform, rngs=rngs)
        if config.batch_norm:
            self.scales = nnx.List([nnx.Param(jnp.ones(size)) for size in HIDDEN])
            self.shifts = nnx.List([nnx.Param(jnp.zeros(size)) for size in HIDDEN])
            self.statistics = nnx.Param(jnp.concatenate([jnp.zeros(sum(HIDDEN)), jnp.ones(sum(HIDDEN))]))
        self.config = config

    def __call__(
        self,
        query: Float[Array, "B D"],
        first_scores: Float[Array, "B K"],
        features: Mapping[str, Float[Array, "B K D"]],
        present: Mapping[str, Bool[Array, "B K"]],
        *,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B K"]:
        """Returns the logit of each candidate; `first_scores` is not used.

        With an `rng`, dropout is applied and `batch_norm`, if set, uses the statistics of the batch, as in training.
        """
        return self.train(query, first_scores, features, present, rng=rng)[0]

    def logits(self, scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """Returns the scores unchanged, because they are logits."""
        return scores

    def train(self, query, first_scores, features, present, *, rng):
        """Returns the logits of `__call__` and the updated `statistics` (None without `batch_norm`)."""
        del first_scores
        rngs = [None] * len(HIDDEN) if rng is None else split_each(example_keys(rng, len(query)), len(HIDDEN))
        custom = [jnp.where(present[name][..., None], features[name], 0.0) for name in self.FEATURES]
        custom = [custom[0] + custom[1]] if self.config.combine == "add" else custom
        x = jnp.concatenate([jnp.broadcast_to(query[:, None], custom[0].shape), *custom], axis=-1)
        means, variances, start = [], [], 0
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if self.config.batch_norm:
                stored = [part[start : start + HIDDEN[number]] for part in jnp.split(self.statistics[...], 2)]
                seen = (x.mean(axis=(0, 1)), x.var(axis=(0, 1))) if rng is not None else stored
                means.append(MOMENTUM * stored[0] + (1 - MOMENTUM) * seen[0])
                variances.append(MOMENTUM * stored[1] + (1 - MOMENTUM) * seen[1])
                start += HIDDEN[number]
                x = (x - seen[0]) * jax.lax.rsqrt(seen[1] + EPSILON) * self.scales[number][...]
                x = x + self.shifts[number][...]
            x = dropout(jax.nn.relu(x), self.config.dropout, rngs[number])
        statistics = jax.lax.stop_gradient(jnp.concatenate(means + variances)) if means else None
        return self.out(x)[..., 0], statistics


PRESETS: dict[str, type[nnx.Module]] = {"gated": Gated, "paper": Paper}
