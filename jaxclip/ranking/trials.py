"""Trials of 100 products and their texts: the protocol of FashionBERT (Gao et al. 2020) and the incorrect-pairs paper.

This is far easier than ranking a whole gallery: if a pair scores t and non-pairs score like independent draws, hit@k is
the chance that fewer than k of 99 draws reach t. Other papers draw other numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.errors import UserError
from jaxclip.ranking import kernel
from jaxclip.ranking.pictures import first_pictures
from jaxclip.ranking.relevance import Relevance

TRIALS, SIZE = 100, 100


def best_ranks(
    texts: np.ndarray,
    images: np.ndarray,
    text_groups,
    image_groups,
    *,
    owners=None,
    size: int = SIZE,
    trials: int = TRIALS,
    seed: int = 0,
) -> np.ndarray:
    """Returns (2, trials, size) the ranks of the matching product for each text, and of the matching text for each.

    A trial draws `size` distinct groups, and one random product and one random text of each; the product and the text
    of a group match. A product has all its pictures, and its score is the highest of theirs. Ties and NaN are treated
    as in `ranks.both_ways`. The same seed draws the same trials, whatever pictures the products have.

    Args:
      texts: (Q, D) embeddings.
      images: (P, D) embeddings, of G products.
      text_groups: (Q,) the group of each text.
      image_groups: (G,) the group of each product.
      owners: (P,) the product of each image, as in `ranks.both_ways`; None = one image each.
      size: number of products in a trial.
      trials: number of trials.
      seed: seed of the draws.

    Raises:
      UserError: the products have fewer groups than `size`, or a group of products has no text.
      ValueError: the owners do not match the images, or the groups the products.
    """
    starts = np.arange(len(images) + 1) if owners is None else first_pictures(owners, len(images))
    if len(image_groups) != len(starts) - 1:
        raise ValueError(f"{len(starts) - 1} products with {len(image_groups)} groups")
    groups = np.unique(image_groups)
    if len(groups) < size:
        raise UserError(f"a trial needs {size} distinct groups, but there are {len(groups)}")
    random = np.random.default_rng(seed)
    text_members = Relevance.from_groups(groups, text_groups)
    image_members = Relevance.from_groups(groups, image_groups)
    counts = np.diff(starts)
    numbers = np.arange(counts.max())[:, None]  # products with fewer pictures repeat their last
    ranks = np.empty((2, trials, size), np.int64)
    for trial in range(trials):
        drawn = random.choice(len(groups), size, replace=False)
        text = _draw_members(text_members, drawn, random)
        product = _draw_members(image_members, drawn, random)
        pictures = starts[product] + np.minimum(numbers, counts[product] - 1)
        ranks[:, trial] = _both_ways(texts[text], images[pictures.reshape(-1)])
    return ranks


@jax.jit
def _both_ways(texts, images):
    """Returns (2, S) the ranks of the matching products and of the matching texts.

    `images` are the first image of each product, then the second of each, and so on.
    """
    scores = kernel.keys(kernel.product(texts, images), finite=False)
    scores = scores.reshape(len(texts), -1, len(texts)).max(axis=1)
    matching = jnp.diagonal(scores)
    return jnp.stack([(scores >= matching[:, None]).sum(axis=1), (scores >= matching).sum(axis=0)])


def _draw_members(members: Relevance, drawn, random):
    """Returns the index of one random member of each drawn group."""
    return members.indices[members.indptr[drawn] + random.integers(members.counts[drawn])]
