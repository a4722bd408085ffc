"""The symmetric InfoNCE loss of CLIP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxclip.losses.labels import NO_LABELS, Labels, is_alike, weighted_mean
from jaxclip.losses.products import cosines


class Queue(NamedTuple):
    """Q pairs of earlier batches, used as additional negatives in both directions.

    Attributes:
      image: image embeddings, unit vectors.
      text: text embeddings, unit vectors.
      group: group of each pair; negative where the slot has not been filled yet.
    """

    image: Float[Array, "Q D"]
    text: Float[Array, "Q D"]
    group: Int[Array, " Q"]

    @property
    def query(self) -> None:
        """None: the batches have no queries."""
        return None


class QueueWithQueries(NamedTuple):
    """A `Queue` of batches with queries. It is a type of its own so that checkpoints of a `Queue` can be restored.

    Attributes:
      image, text, group: see `Queue`.
      query: `Labels.query` of each pair.
    """

    image: Float[Array, "Q D"]
    text: Float[Array, "Q D"]
    group: Int[Array, " Q"]
    query: Int[Array, " Q"]


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    labels: Labels = NO_LABELS,
    queue: Queue | QueueWithQueries | None = None,
    *,
    products: str = "float32",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss and metrics {"image_to_text_accuracy", "text_to_image_accuracy"}.

    The loss is the mean of the cross-entropies of both directions (Radford et al. 2021, Figure 3; van den Oord et al.
    2018), computed in float32 over the whole batch. With weights it is sum(w_i l_i) / sum(w_i), where l_i is the mean
    of the two cross-entropies of pair i, in which the other pairs are negatives whatever their weights. An accuracy is
    the share of rows whose partner has the highest logit, alone or tied, among the partner and the negatives. If the
    rows are sharded under jit, the compiler gathers them.

    Args:
      image_embedding, text_embedding: unit vectors; row i of both is a pair, and all other rows are negatives, except
        those that `labels` excludes.
      logit_scale: factor that turns cosines into logits.
      labels: groups, queries and weights of the pairs.
      queue: additional negatives, of which those from other groups are used (the memory bank of Wu et al. 2018,
        arXiv:1805.01978); no gradient flows through them. It requires `labels.group`.
      products: precision of the matrix products, one of `products.PRODUCTS`.
    """
    logits = logit_scale * cosines(image_embedding, text_embedding, products)  # (B, B) images x texts
    pairs = jnp.eye(len(logits), dtype=bool)
    same = is_alike(labels, labels)
    if same is not None:
        logits = jnp.where(same & ~pairs, -jnp.inf, logits)
    # jnp.diagonal would be a gather, which XLA compiles on a mesh to collectives inside a conditional.
    positives = jnp.sum(jnp.where(pairs, logits, 0.0), axis=1)  # (B,)
    of_images = of_texts = logits  # (B, B + Q), one image per row; (B + Q, B), one text per column
    if queue is not None:
        usable = (labels.group[:, None] != queue.group) & (queue.group >= 0)  # (B, Q)
        same_query = is_alike(Labels(query=labels.query), Labels(query=queue.query))
        if same_query is not None:
            usable &= ~same_query
        images, texts = jax.lax.stop_gradient(queue[:2])
        further = jnp.where(usable, logit_scale * cosines(image_embedding, texts, products), -jnp.inf)  # (B, Q)
        of_images = jnp.concatenate([logits, further], axis=1)
        further = jnp.where(usable.T, logit_scale * cosines(images, text_embedding, products), -jnp.inf)  # (Q, B)
        of_texts = jnp.concatenate([logits, further], axis=0)
    image_to_text = jax.nn.logsumexp(of_images, axis=1) - positives
    text_to_image = jax.nn.logsumexp(of_texts, axis=0) - positives
    accuracy = {
        "image_to_text_accuracy": jnp.mean(positives >= of_images.max(axis=1)),
        "text_to_image_accuracy": jnp.mean(positives >= of_texts.max(axis=0)),
    }
    return 0.5 * (weighted_mean(image_to_text, labels.weight) + weighted_mean(text_to_image, labels.weight)), accuracy
