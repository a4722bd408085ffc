"""The symmetric InfoNCE loss of CLIP."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Queue(NamedTuple):
    """Embeddings of pairs of earlier batches, further negatives for both directions; a group below 0 = not filled."""

    image: Float[Array, "Q D"]
    text: Float[Array, "Q D"]
    group: Int[Array, " Q"]


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
    queue: Queue | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean cross-entropy of both directions and, beside it, each direction's share of right answers.

    Row i of both sides is a pair; all other rows of the batch are its negatives (Radford et al. 2021, Figure 3; van den
    Oord et al. 2018). With `groups`, rows of the same group are the same product to a searcher and are left out of each
    other's negatives. A `queue`, which needs groups, has further negatives for each row, never of its own group (Wu et
    al. 2018's memory bank, arXiv:1805.01978); nothing is learned through it. Computed in float32 over the whole batch:
    under jit with sharded rows the compiler gathers them.
    """
    logits = logit_scale * _cosines(image_embedding, text_embedding)  # (B, B) images x texts
    pairs = jnp.eye(len(logits), dtype=bool)
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        logits = jnp.where(same & ~pairs, -jnp.inf, logits)
    # Not jnp.diagonal: on a mesh its gather has collectives, and those inside a condition.
    positives = jnp.sum(jnp.where(pairs, logits, 0.0), axis=1)  # (B,)
    of_images = of_texts = logits  # (B, B + Q) an image in each row, (B + Q, B) a text in each column
    if queue is not None:
        usable = (groups[:, None] != queue.group) & (queue.group >= 0)  # (B, Q)
        images, texts, _ = jax.lax.stop_gradient(queue)
        further = jnp.where(usable, logit_scale * _cosines(image_embedding, texts), -jnp.inf)  # (B, Q)
        of_images = jnp.concatenate([logits, further], axis=1)
        further = jnp.where(usable.T, logit_scale * _cosines(images, text_embedding), -jnp.inf)  # (Q, B)
        of_texts = jnp.concatenate([logits, further], axis=0)
    image_to_text = jax.nn.logsumexp(of_images, axis=1) - positives
    text_to_image = jax.nn.logsumexp(of_texts, axis=0) - positives
    accuracy = {
        "image_to_text_accuracy": jnp.mean(positives >= of_images.max(axis=1)),
        "text_to_image_accuracy": jnp.mean(positives >= of_texts.max(axis=0)),
    }
    return 0.5 * (image_to_text.mean() + text_to_image.mean()), accuracy


def _cosines(rows: Float[Array, "B D"], others: Float[Array, "N D"]) -> Float[Array, "B N"]:
    return jnp.matmul(rows, others.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
