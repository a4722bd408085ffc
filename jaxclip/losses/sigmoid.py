"""The pairwise sigmoid loss of SigLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sigmoid(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Returns the sum over all B x B entries of -log sigmoid(z (scale cosine + bias)), divided by B.

    Row i of both embeddings, unit vectors, is a pair. z is 1 on the diagonal, where image and text are a pair, and -1
    elsewhere (Zhai et al. 2023, arXiv:2303.15343, Algorithm 1). With `groups`, off-diagonal entries whose image and
    text belong to the same group are excluded from the sum. The loss is computed in float32.
    """
    cosines = jnp.matmul(
        image_embedding, text_embedding.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # (B, B) images x texts
    logits = logit_scale * cosines + logit_bias
    pairs = jnp.eye(len(logits), dtype=bool)
    costs = jax.nn.softplus(jnp.where(pairs, -logits, logits))
    if groups is not None:
        costs = jnp.where((groups[:, None] == groups[None, :]) & ~pairs, 0.0, costs)
    return jnp.sum(costs) / len(costs)
