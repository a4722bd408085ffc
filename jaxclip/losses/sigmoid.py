"""The pairwise sigmoid loss of SigLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxclip.losses.products import cosines


def sigmoid(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
    *,
    products: str = "float32",
) -> Float[Array, ""]:
    """Returns the sum over all B x B entries of -log sigmoid(z (scale cosine + bias)), divided by B.

    Row i of both embeddings, unit vectors, is a pair. z is 1 on the diagonal, where image and text are a pair, and -1
    elsewhere (Zhai et al. 2023, arXiv:2303.15343, Algorithm 1). With `groups`, off-diagonal entries whose image and
    text belong to the same group are excluded from the sum. The loss is computed in float32, with
    matrix products of the precision `products` (one of `products.PRODUCTS`).
    """
    similarities = cosines(image_embedding, text_embedding, products)  # (B, B) images x texts
    logits = logit_scale * similarities + logit_bias
    pairs = jnp.eye(len(logits), dtype=bool)
    costs = jax.nn.softplus(jnp.where(pairs, -logits, logits))
    if groups is not None:
        costs = jnp.where((groups[:, None] == groups[None, :]) & ~pairs, 0.0, costs)
    return jnp.sum(costs) / len(costs)
