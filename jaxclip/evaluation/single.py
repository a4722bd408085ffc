"""The protocol `single`: one product of each group, drawn ten times, so that every text has exactly one answer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxclip.evaluation.protocols import GroupedEmbeddings, chance, figures
from jaxclip.ranking import draws, metrics
from jaxclip.ranking.ranks import both_ways
from jaxclip.ranking.relevance import Relevance


def evaluate(
    texts: GroupedEmbeddings,
    products: GroupedEmbeddings,
    owners: np.ndarray,
    *,
    ks: Sequence[int],
    progress: Callable[[Iterable], Iterable] = iter,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the figures of both directions, averaged over the draws, and the number of "draws".

    Each draw takes one product of each group, and one of its texts; the gallery has as many products as there are
    groups with a text. A group's value is its mean over the draws, and the intervals are over groups. The draws depend
    on the order of the groups and of the products, not on the groups' names.

    Args:
      texts: the Q texts.
      products: the G products.
      owners: (Q,) the product of each text.
      ks: the cut-offs.
      progress: wraps the sequence of draws, for a progress bar.
      seed: seed of the draws and of the bootstrap.
    """
    described, counts = np.unique(owners, return_counts=True)
    order = np.argsort(owners, kind="stable")  # the texts, product by product
    starts = np.cumsum(counts) - counts
    groups = np.unique(products.groups[described], return_inverse=True)[1]
    drawn = draws.single_draws(groups, seed=seed)  # (draws, N)
    size = drawn.shape[1]
    # As many pictures as any product of the group, so that all draws run one compiled program.
    pictures = np.zeros(size, int)
    np.maximum.at(pictures, groups, products.counts[described])
    relevance = Relevance.from_pairs(np.arange(size), np.arange(size), size)
    values: list[list[dict[str, np.ndarray]]] = [[], []]
    best_ranks: list[list[np.ndarray]] = [[], []]
    for number, chosen in enumerate(progress(list(drawn))):
        random = np.random.default_rng([seed, number, 1])
        text = order[starts[chosen] + random.integers(counts[chosen])]
        shown = products.take(described[chosen], pictures)
        found = both_ways(texts.embeddings[text], shown.embeddings, relevance, owners=shown.owners)
        for direction, ranks in enumerate(found):
            values[direction].append(metrics.per_query(ranks.ranks, relevance.indptr, ks))
            best_ranks[direction].append(metrics.best_rank(ranks.ranks, relevance.indptr))
    forth, back = (
        figures(
            np.mean(best_ranks[direction], axis=0),
            {name: np.mean([one[name] for one in values[direction]], axis=0) for name in values[direction][0]},
            seed,
        )
        for direction in (0, 1)
    )
    expected = chance(relevance.counts, size, ks)
    return {
        "text_to_image": forth,
        "image_to_text": back,
        "chance": expected,
        "chance_image_to_text": expected,
        "draws": len(drawn),
        "queries": size,
        "gallery": size,
    }
