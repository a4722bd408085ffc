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

    A trial draws 100 distinct groups, and one random image and one random text of each. Ties and NaN are treated as in
    `ranks.both_ways`. The same seed draws the same trials.

    Args:
      texts: (Q, D) embeddings. images: (G, D) embeddings.
      text_groups: (Q,) the group of each text. image_groups: (G,) the group of each image.
      trials: number of trials.
      seed: seed of the draws.

    Raises:
      UserError: there are fewer than 100 groups.
    """
    groups = np.unique(image_groups)
    if len(groups) < SIZE:
        raise UserError(f"a trial needs {SIZE} distinct groups, and there are {len(groups)}")
    random = np.random.default_rng(seed)
    image_of, text_of = Relevance.from_groups(groups, image_groups), Relevance.from_groups(groups, text_groups)
    found = np.empty((2, trials, SIZE), np.int64)
    for trial in range(trials):
        drawn = random.choice(len(groups), SIZE, replace=False)
        found[:, trial] = _both(texts[_one_each(text_of, drawn, random)], images[_one_each(image_of, drawn, random)])
    return found


@jax.jit
def _both(texts, images):
    scores = kernel.keys(kernel.product(texts, images), finite=False)
    right = jnp.diagonal(scores)
    return jnp.stack([(scores >= right[:, None]).sum(axis=1), (scores >= right).sum(axis=0)])


def _one_each(members: Relevance, drawn, random):
    """Returns a random member of each drawn group."""
    return members.indices[members.indptr[drawn] + random.integers(members.counts[drawn])]
