"""The pairwise sigmoid loss of SigLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxclip.losses.labels import NO_LABELS, Labels, divisor, is_alike
from jaxclip.losses.products import cosines


def sigmoid(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    labels: Labels = NO_LABELS,
    *,
    products: str = "float32",
) -> Float[Array, ""]:
    """Returns the sum over all B x B entries of -log sigmoid(z (scale cosine + bias)), divided by B.

    Row i of both embeddings, unit vectors, is a pair. z is 1 on the diagonal, where image and text are a pair, and -1
    elsewhere (Zhai et al. 2023, arXiv:2303.15343, Algorithm 1). Off-diagonal entries whose image and text belong to one
    group, or to one query, of `labels` are excluded from the sum. With weights the loss is sum(w_i l_i) / sum(w_i),
    where l_i is the entry of pair i and half of the other entries of its row and of its column, so that a negative has
    the mean weight of its image's and its text's pair. The loss is computed in float32, with matrix products of the
    precision `products` (one of `products.PRODUCTS`).
    """
    similarities = cosines(image_embedding, text_embedding, products)  # (B, B) images x texts
    logits = logit_scale * similarities + logit_bias
    pairs = jnp.eye(len(logits), dtype=bool)
    costs = jax.nn.softplus(jnp.where(pairs, -logits, logits))
    same = is_alike(labels, labels)
    if same is not None:
        costs = jnp.where(same & ~pairs, 0.0, costs)
    if labels.weight is None:
        return jnp.sum(costs) / len(costs)
    weights = 0.5 * (labels.weight[:, None] + labels.weight)
    return jnp.sum(costs * weights) / divisor(jnp.sum(labels.weight))
