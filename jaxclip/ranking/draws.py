"""Draws of one product for each group: galleries of the `single` protocol, in which every query has one answer."""

import numpy as np

from jaxclip.ranking.relevance import Relevance

DRAWS = 10


def single_draws(groups, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Returns (draws, N) the product that each draw takes of each of N groups, groups in ascending order.

    A product of a group is as likely as any other. A draw depends only on the groups, the seed and its number: not on
    the number of draws or of devices.

    Args:
      groups: (G,) the group of each product, names or numbers.
      draws: number of draws.
      seed: seed of the draws.
    """
    groups = np.asarray(groups)
    members = Relevance.from_groups(np.unique(groups), groups)
    randoms = (np.random.default_rng([seed, number]) for number in range(draws))
    return np.stack([members.indices[members.indptr[:-1] + random.integers(members.counts)] for random in randoms])
