"""Losses of re-rankers: functions of the scores of each query's candidates and of which of these are relevant."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

NEGATIVES = ("random", "worst", "top", "mixed")


def list_softmax(scores: Float[Array, "B K"], relevant: Bool[Array, "B K"]) -> Float[Array, ""]:
    """Returns the mean over queries of -log of the share that softmax gives to the relevant candidates together.

    ListNet's top-one cross-entropy (Cao et al. 2007, Eq. 6) with the relevant ones as one class: any of them will do.
    Every query has a relevant candidate.
    """
    positive = jax.nn.logsumexp(jnp.where(relevant, scores, -jnp.inf), axis=1)
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - positive)


def lambda_loss(scores: Float[Array, "B K"], relevant: Bool[Array, "B K"]) -> Float[Array, ""]:
    """Returns the mean over queries of the sum over pairs of |change of nDCG if swapped| * log2(1 + exp(-margin)).

    LambdaRank's weights on the logistic loss of (relevant, non-relevant) pairs, as LambdaLoss states it (Wang et al.
    2018, Eq. 14 with binary gain); the ranks are those by the scores, which stand still in them.
    """
    ranks = 1 + jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(scores), axis=1, stable=True), axis=1)  # (B, K)
    discount = 1.0 / jnp.log2(1.0 + ranks.astype(jnp.float32))  # (B, K)
    count = jnp.arange(scores.shape[1]) < relevant.sum(axis=1, keepdims=True)
    ideal = jnp.sum(jnp.where(count, 1.0 / jnp.log2(2.0 + jnp.arange(scores.shape[1])), 0.0), axis=1)  # (B,)
    weights = jnp.abs(discount[:, :, None] - discount[:, None, :]) / ideal[:, None, None]  # (B, K, K)
    margins = scores[:, :, None] - scores[:, None, :]
    pairs = relevant[:, :, None] & ~relevant[:, None, :]
    losses = jnp.where(pairs, weights * jax.nn.softplus(-margins), 0.0) / jnp.log(2.0)
    return jnp.mean(losses.sum(axis=(1, 2)))


def contrastive(scores: Float[Array, "B B"], relevant: Bool[Array, "B B"]) -> Float[Array, ""]:
    """Returns `list_softmax` over the answers for each query and over the queries for each answer, the mean of both.

    Row i are the scores of query i with one answer to each query of the batch.
    """
    return 0.5 * (list_softmax(scores, relevant) + list_softmax(scores.T, relevant.T))


def binary_cross_entropy(scores: Float[Array, "..."], relevant: Bool[Array, "..."]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of sigmoid(score) against relevance."""
    return jnp.mean(jax.nn.softplus(jnp.where(relevant, -scores, scores)))


def choose_pair(relevant: Bool[Array, "B K"], negatives: str, rng: Key[Array, ""]) -> Int[Array, "B 2"]:
    """Returns the positions of one relevant and of one non-relevant candidate of each query.

    Candidates come best first. The relevant one is drawn at random; the other is a key of NEGATIVES: `random`; `worst`,
    the last in the list (the fit-aware paper's choice, section 5); `top`, one of the first ten non-relevant ones;
    `mixed`, each of these for a third of the queries.
    """
    positive_rng, random_rng, top_rng, kind_rng = jax.random.split(rng, 4)
    rows, size = relevant.shape

    def draw(among: Array, rng: Array) -> Array:
        return jnp.argmax(jnp.where(among, jax.random.uniform(rng, relevant.shape, minval=0.1), 0.0), axis=1)

    others = ~relevant
    top = others & (jnp.cumsum(others, axis=1) <= 10)
    choices = {
        "random": draw(others, random_rng),
        "worst": size - 1 - jnp.argmax(others[:, ::-1], axis=1),
        "top": draw(top, top_rng),
    }
    if negatives == "mixed":
        kind = jax.random.randint(kind_rng, (rows,), 0, len(choices))
        negative = jnp.stack(list(choices.values()))[kind, jnp.arange(rows)]
    else:
        negative = choices[negatives]
    return jnp.stack([draw(relevant, positive_rng), negative], axis=1)


def choose_some(relevant: Bool[Array, "B K"], count: int, rng: Key[Array, ""]) -> Int[Array, "B N"]:
    """Returns the positions of one relevant candidate of each query, first, and of N - 1 others, all at random."""
    draws = jax.random.uniform(rng, relevant.shape)
    positive = jnp.argmax(jnp.where(relevant, draws, -1.0), axis=1, keepdims=True)  # (B, 1)
    others = jnp.put_along_axis(draws, positive, 2.0, axis=1, inplace=False)
    return jax.lax.top_k(others, min(count, relevant.shape[1]))[1]
