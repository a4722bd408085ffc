"""The symmetric InfoNCE loss of CLIP."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the mean cross-entropy of both directions and, beside it, each direction's share of right answers.

    Row i of both sides is a pair; all other rows of the batch are its negatives (Radford et al. 2021, Figure 3; van den
    Oord et al. 2018). With `groups`, rows of the same group are the same product to a searcher and are left out of each
    other's negatives. Computed in float32 over the whole batch: under jit with sharded rows the compiler gathers them.
    """
    logits = logit_scale * jnp.matmul(
        image_embedding, text_embedding.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )  # (B, B) images x texts
    if groups is not None:
        same = groups[:, None] == groups[None, :]
        others = same & ~jnp.eye(len(groups), dtype=bool)
        logits = jnp.where(others, -jnp.inf, logits)
    positives = jnp.diagonal(logits)  # (B,)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - positives
    text_to_image = jax.nn.logsumexp(logits, axis=0) - positives
    accuracy = {
        "image_to_text_accuracy": jnp.mean(positives >= logits.max(axis=1)),
        "text_to_image_accuracy": jnp.mean(positives >= logits.max(axis=0)),
    }
    return 0.5 * (image_to_text.mean() + text_to_image.mean()), accuracy
