"""The weighted loss over correct and incorrect pairs (Tagami et al., section 3)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

WEIGHTINGS = ("similarity", "none", "literal")
_EDGE = 1e-6


def incorrect_pairs(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    incorrect_embedding: Float[Array, "B D"],
    similarity: Float[Array, " B"],
    has_incorrect: Bool[Array, " B"],
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    weighting: str = "similarity",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns alpha L_p + beta L_n (Eq. 3), and the mean similarity of correct and of incorrect pairs.

    L_p and L_n are the means over the batch of -w_p log(s_p) and -w_n log(1 - s_n). These are Eqs. 4 and 5 with the
    weight outside the logarithm, as the paper's text describes it, and with means instead of sums. The weights are
    w_p = S and w_n = 1 - S (Eqs. 1 and 2), where S is the similarity between the image and the image that the incorrect
    text belongs to. Every similarity is (1 + cosine) / 2, kept strictly inside (0, 1).

    Args:
      image_embedding, text_embedding: unit vectors of the correct pairs.
      incorrect_embedding: unit vectors of the incorrect text of each image.
      similarity: cosine between each image and the image that its incorrect text belongs to.
      has_incorrect: False where an image has no incorrect text: it is left out of L_n and has weight 1 in L_p.
      alpha, beta: weights of the two terms.
      weighting: "similarity": as above; "none": all weights are 1; "literal": the weights are inside the logarithm, as
        Eqs. 4 and 5 are printed, where they only add a constant and do not affect the gradient.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is none of {WEIGHTINGS}")
    correct = _likeness(jnp.sum(image_embedding * text_embedding, axis=1))  # (B,)
    # 1 - s is computed from the negated cosine, which keeps full precision where 1 - s is close to 0.
    unlike = _likeness(-jnp.sum(image_embedding * incorrect_embedding, axis=1))  # (B,)
    alike, apart = (jnp.where(has_incorrect, _likeness(sign * similarity), 1.0) for sign in (1, -1))
    if weighting == "similarity":
        positive, negative = -alike * jnp.log(correct), -apart * jnp.log(unlike)
    elif weighting == "literal":
        positive, negative = -jnp.log(alike * correct), -jnp.log(apart * unlike)
    else:
        positive, negative = -jnp.log(correct), -jnp.log(unlike)
    present = has_incorrect.astype(jnp.float32)
    value = alpha * jnp.mean(positive) + beta * jnp.mean(jnp.where(has_incorrect, negative, 0.0))
    wrong = jnp.sum(present * (1.0 - unlike)) / jnp.maximum(jnp.sum(present), 1.0)
    return value, {"correct_similarity": jnp.mean(correct), "incorrect_similarity": wrong}


def _likeness(cosine: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns (1 + cosine) / 2 squeezed slightly inside (0, 1), so that its logarithm and gradient are finite."""
    return _EDGE + (1.0 - 2.0 * _EDGE) * 0.5 * (1.0 + cosine.astype(jnp.float32))
