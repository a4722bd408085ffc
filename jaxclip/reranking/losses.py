"""Losses of re-rankers, and draws of candidates for them; B queries have a list of K candidates each."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

NEGATIVES = ("random", "worst", "top", "mixed")


def list_softmax(scores: Float[Array, "B K"], relevant: Bool[Array, "B K"]) -> Float[Array, ""]:
    """Returns the mean over queries of -log(sum of the softmax probabilities of the relevant candidates).

    This is ListNet's top-one cross-entropy (Cao et al. 2007, Eq. 6) with the relevant candidates as one class. Every
    query must have a relevant candidate.
    """
    positive = jax.nn.logsumexp(jnp.where(relevant, scores, -jnp.inf), axis=1)
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - positive)


def lambda_loss(scores: Float[Array, "B K"], relevant: Bool[Array, "B K"]) -> Float[Array, ""]:
    """Returns the mean over queries of the sum over pairs of |change of nDCG if swapped| * log2(1 + exp(-margin)).

    The pairs are (relevant, non-relevant) candidates, and a margin is the first one's score minus the second's. This
    is the logistic loss with the weights of LambdaRank, in the form of LambdaLoss (Wang et al. 2018, Eq. 14 with binary
    gain). The ranks are computed from the scores, and no gradient flows through them.
    """
    ranks = 1 + jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(scores), axis=1, stable=True), axis=1)  # (B, K)
    discount = 1.0 / jnp.log2(1.0 + ranks.astype(jnp.float32))  # (B, K)
    ideal_places = jnp.arange(scores.shape[1]) < relevant.sum(axis=1, keepdims=True)
    ideal = jnp.sum(jnp.where(ideal_places, 1.0 / jnp.log2(2.0 + jnp.arange(scores.shape[1])), 0.0), axis=1)  # (B,)
    weights = jnp.abs(discount[:, :, None] - discount[:, None, :]) / ideal[:, None, None]  # (B, K, K)
    margins = scores[:, :, None] - scores[:, None, :]
    pairs = relevant[:, :, None] & ~relevant[:, None, :]
    losses = jnp.where(pairs, weights * jax.nn.softplus(-margins), 0.0) / jnp.log(2.0)
    return jnp.mean(losses.sum(axis=(1, 2)))


def contrastive(scores: Float[Array, "B B"], relevant: Bool[Array, "B B"]) -> Float[Array, ""]:
    """Returns the mean of `list_softmax` over rows (queries) and over columns (answers).

    Entry (i, j) is the score of query i with a relevant candidate of query j.
    """
    return 0.5 * (list_softmax(scores, relevant) + list_softmax(scores.T, relevant.T))


def binary_cross_entropy(scores: Float[Array, "..."], relevant: Bool[Array, "..."]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of sigmoid(score) against relevance."""
    return jnp.mean(jax.nn.softplus(jnp.where(relevant, -scores, scores)))


def sample_pair(relevant: Bool[Array, "B K"], negatives: str, rng: Key[Array, ""]) -> Int[Array, "B 2"]:
    """Returns the positions of one relevant and one non-relevant candidate in each query's list, which must have both.

    The relevant one is drawn at random.

    Args:
      relevant: relevance of the candidates of each list, sorted by first-stage score, best first.
      negatives: how the non-relevant one is chosen among the non-relevant candidates: "random", any of them; "worst",
        always the last (section 5 of the fit-aware paper, see `networks.Paper`); "top", a random one of the first ten;
        "mixed", by one of these three rules, drawn for each query.
      rng: random key.
    """
    positive_rng, random_rng, top_rng, kind_rng = jax.random.split(rng, 4)
    rows, size = relevant.shape

    def draw(eligible: Array, rng: Array) -> Array:
        return jnp.argmax(jnp.where(eligible, jax.random.uniform(rng, relevant.shape, minval=0.1), 0.0), axis=1)

    non_relevant = ~relevant
    top = non_relevant & (jnp.cumsum(non_relevant, axis=1) <= 10)
    choices = {
        "random": draw(non_relevant, random_rng),
        "worst": size - 1 - jnp.argmax(non_relevant[:, ::-1], axis=1),
        "top": draw(top, top_rng),
    }
    if negatives == "mixed":
        kind = jax.random.randint(kind_rng, (rows,), 0, len(choices))
        negative = jnp.stack(list(choices.values()))[kind, jnp.arange(rows)]
    else:
        negative = choices[negatives]
    return jnp.stack([draw(relevant, positive_rng), negative], axis=1)


def sample_candidates(relevant: Bool[Array, "B K"], count: int, rng: Key[Array, ""]) -> Int[Array, "B N"]:
    """Returns the positions of N = min(count, K) candidates in each query's list, drawn at random.

    The first one is relevant if the list has a relevant candidate; the others may be relevant or not.
    """
    draws = jax.random.uniform(rng, relevant.shape)
    positive = jnp.argmax(jnp.where(relevant, draws, -1.0), axis=1, keepdims=True)  # (B, 1)
    others = jnp.put_along_axis(draws, positive, 2.0, axis=1, inplace=False)
    return jax.lax.top_k(others, min(count, relevant.shape[1]))[1]
