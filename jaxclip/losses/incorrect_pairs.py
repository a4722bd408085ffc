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

    L_p and L_n are means over the batch of -w_p log(s_p) and -w_n log(1 - s_n): Eqs. 4 and 5 with the weight on the
    term, as the text means it, and with means in place of sums. w_p = S and w_n = 1 - S (Eqs. 1 and 2), where S is how
    alike the image and its partner's image are. Every similarity is (1 + cosine) / 2, kept inside (0, 1).

    Args:
      image_embedding, text_embedding: unit vectors of the correct pairs.
      incorrect_embedding: unit vectors of the texts that the images are wrongly shown with.
      similarity: cosines between each image and the image whose text it is wrongly shown with.
      has_incorrect: False for a row that has no such text: it is not in L_n, and fully in L_p.
      alpha, beta: weights of the two terms.
      weighting: "similarity"; "none" has all weights 1; "literal" has them inside the logarithm, as Eqs. 4 and 5 are
        printed, where they add a constant and change no gradient.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting {weighting!r} is none of {WEIGHTINGS}")
    correct = _likeness(jnp.sum(image_embedding * text_embedding, axis=1))  # (B,)
    # 1 - s computed as the likeness of the opposite, which loses no digits near 0.
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
    """Returns (1 + cosine) / 2, by a hair narrower than (0, 1): the logarithm is finite and has a slope everywhere."""
    return _EDGE + (1.0 - 2.0 * _EDGE) * 0.5 * (1.0 + cosine.astype(jnp.float32))
