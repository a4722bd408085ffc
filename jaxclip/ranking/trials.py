"""Trials of 100 images and their texts: the protocol of FashionBERT (Gao et al. 2020) and of the incorrect-pairs paper.

This is far easier than ranking a whole gallery: if a pair scores t and non-pairs score like independent draws, hit@k is
the chance that fewer than k of 99 draws reach t.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxclip.errors import UserError
from jaxclip.ranking import kernel
from jaxclip.ranking.relevance import Relevance

TRIALS, SIZE = 100, 100


def best_ranks(
    texts: np.ndarray, images: np.ndarray, text_groups, image_groups, *, trials: int = TRIALS, seed: int = 0
) -> np.ndarray:
    """Returns (2, trials, 100) the ranks of the matching image for each text, and of the matching text for each image.

    A trial draws 100 distinct groups, and one random image and one random text of each; the image and the text of a
    group match. Ties and NaN are treated as in `ranks.both_ways`. The same seed draws the same trials.

    Args:
      texts: (Q, D) embeddings.
      images: (G, D) embeddings.
      text_groups: (Q,) the group of each text.
      image_groups: (G,) the group of each image.
      trials: number of trials.
      seed: seed of the draws.

    Raises:
      UserError: the images have fewer than 100 groups, or a group of images has no text.
    """
    groups = np.unique(image_groups)
    if len(groups) < SIZE:
        raise UserError(f"a trial needs {SIZE} distinct groups, but there are {len(groups)}")
    random = np.random.default_rng(seed)
    text_members = Relevance.from_groups(groups, text_groups)
    image_members = Relevance.from_groups(groups, image_groups)
    ranks = np.empty((2, trials, SIZE), np.int64)
    for trial in range(trials):
        drawn = random.choice(len(groups), SIZE, replace=False)
        text = _draw_members(text_members, drawn, random)
        image = _draw_members(image_members, drawn, random)
        ranks[:, trial] = _both_ways(texts[text], images[image])
    return ranks


@jax.jit
def _both_ways(texts, images):
    """Returns (2, 100) the ranks of the matching images and of the matching texts."""
    scores = kernel.keys(kernel.product(texts, images), finite=False)
    matching = jnp.diagonal(scores)
    return jnp.stack([(scores >= matching[:, None]).sum(axis=1), (scores >= matching).sum(axis=0)])


def _draw_members(members: Relevance, drawn, random):
    """Returns the index of one random member of each drawn group."""
    return members.indices[members.indptr[drawn] + random.integers(members.counts[drawn])]
