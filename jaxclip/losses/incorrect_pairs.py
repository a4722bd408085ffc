"""The weighted loss over correct and incorrect pairs (Tagami et al., section 3)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxclip.losses.labels import weighted_mean

WEIGHTINGS = ("similarity", "none", "literal")
_EDGE = 1e-6  # smallest distance of a similarity from 0 and 1, so that logarithms and gradients are finite


class Incorrect(NamedTuple):
    """The incorrect texts of a batch's images.

    Attributes:
      embedding: unit vectors of the incorrect text of each image.
      similarity: cosine between each image and the image that its incorrect text belongs to.
      present: False if the image has no incorrect text.
    """

    embedding: Float[Array, "B D"]
    similarity: Float[Array, " B"]
    present: Bool[Array, " B"]


def incorrect_pairs(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    incorrect: Incorrect,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    weighting: str = "similarity",
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns alpha L_p + beta L_n (Eq. 3), and metrics {"correct_similarity", "incorrect_similarity"}.

    L_p and L_n are the means over the batch of -w_p log(s_p) and -w_n log(1 - s_n), where s_p and s_n are the
    similarities of the image with its correct and its incorrect text. These are Eqs. 4 and 5 with the weight outside
    the logarithm, as the paper's text describes it, and with means instead of sums. The weights are w_p = S and
    w_n = 1 - S (Eqs. 1 and 2), where S is the similarity between the image and the image that the incorrect text
    belongs to. A similarity is (1 + cosine) / 2, rescaled to lie strictly between 0 and 1. The metrics are the mean
    similarities of the correct and of the incorrect pairs.

    Args:
      image_embedding, text_embedding: unit vectors of the correct pairs.
      incorrect: the incorrect text of each image. An image without one counts as 0 in the mean L_n, and has weight 1 in
        L_p.
      alpha, beta: weights of the two terms.
      weighting: "similarity" uses the weights above; "none" sets all weights to 1; "literal" puts the weights inside
        the logarithm, as Eqs. 4 and 5 are printed, where they only add a constant and do not affect the gradient.
      weight: further weight of each pair's term of L_p, which is then a weighted mean; L_n is unchanged, because it
        does not see the correct text.

    Raises:
      ValueError: `weighting` is not one of WEIGHTINGS.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is not one of {WEIGHTINGS}")
    correct = _likeness(jnp.sum(image_embedding * text_embedding, axis=1))  # (B,)
    # 1 - s_n is computed from the negated cosine, because subtracting from 1 would lose precision if s_n is near 1.
    unlike = _likeness(-jnp.sum(image_embedding * incorrect.embedding, axis=1))  # (B,)
    alike, apart = (jnp.where(incorrect.present, _likeness(sign * incorrect.similarity), 1.0) for sign in (1, -1))
    if weighting == "similarity":
        positive, negative = -alike * jnp.log(correct), -apart * jnp.log(unlike)
    elif weighting == "literal":
        positive, negative = -jnp.log(alike * correct), -jnp.log(apart * unlike)
    else:
        positive, negative = -jnp.log(correct), -jnp.log(unlike)
    present = incorrect.present.astype(jnp.float32)
    value = alpha * weighted_mean(positive, weight) + beta * jnp.mean(jnp.where(incorrect.present, negative, 0.0))
    wrong = jnp.sum(present * (1.0 - unlike)) / jnp.maximum(jnp.sum(present), 1.0)
    return value, {"correct_similarity": jnp.mean(correct), "incorrect_similarity": wrong}


def _likeness(cosine: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns the similarity (1 + cosine) / 2, rescaled to [_EDGE, 1 - _EDGE]."""
    return _EDGE + (1.0 - 2.0 * _EDGE) * 0.5 * (1.0 + cosine.astype(jnp.float32))
