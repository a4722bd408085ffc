"""The protocol `pairs`: a text asks for its own product alone, in the whole gallery, as papers and open_clip count."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxclip.evaluation.protocols import GroupedEmbeddings, chance, differences, figures, means
from jaxclip.ranking import metrics
from jaxclip.ranking.candidates import Candidates, rank_changes
from jaxclip.ranking.ranks import Ranks, both_ways, ranks
from jaxclip.ranking.relevance import Relevance


def evaluate(
    texts: GroupedEmbeddings,
    products: GroupedEmbeddings,
    owners: np.ndarray,
    keys: Sequence,
    *,
    ks: Sequence[int],
    progress: Callable[[Iterable], Iterable] = iter,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the figures of both directions, the chance of a random order, and the "ceiling" of hit@k.

    The other products of a text's group are wrong answers here. Where texts repeat, no ranking can answer all of them:
    the ceilings are the highest possible hit@k of each direction (`metrics.hit_ceiling`, `metrics.item_hit_ceiling`).
    The direction from image to text is left out if a product has no text.

    Args:
      texts: the Q texts.
      products: the G products.
      owners: (Q,) the product of each text.
      keys: (Q,) a key of each text, equal for texts that have the same embedding because they are the same.
      ks: the cut-offs.
      progress: wraps the sequence of query blocks, for a progress bar.
      seed: seed of the bootstrap.
    """
    size = len(products.groups)
    relevance = Relevance.from_pairs(np.arange(len(owners)), owners, len(owners))
    arguments = texts.embeddings, products.embeddings, relevance
    result = _sizes(owners, keys, size, ks)
    if len(np.unique(owners)) < size:
        forth = ranks(*arguments, owners=products.owners, progress=progress)
    else:
        forth, back = both_ways(*arguments, owners=products.owners, progress=progress)
        reverse = relevance.transpose(size)
        result["image_to_text"] = _figures(back, reverse, ks, seed)
        result["chance_image_to_text"] = chance(reverse.counts, len(owners), ks)
        result["ceiling_image_to_text"] = {f"hit@{k}": metrics.item_hit_ceiling(keys, owners, k) for k in ks}
    return {"text_to_image": _figures(forth, relevance, ks, seed), **result}


def evaluate_reranked(
    texts: GroupedEmbeddings,
    products: GroupedEmbeddings,
    owners: np.ndarray,
    keys: Sequence,
    second_stage: Callable[[Candidates], np.ndarray],
    *,
    ks: Sequence[int],
    candidates: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the figures of both stages from text to image, and those of `evaluate` that do not depend on a ranking.

    "reranked" has the keys of `protocols.evaluate`, and "compared": the `protocols.differences` of the two stages.

    Args:
      texts, products, owners, keys, ks, seed: as in `evaluate`.
      second_stage: candidates -> their new scores (Q, K), by which they are re-ordered.
      candidates: K, the number of candidates per text.
    """
    size = len(products.groups)
    relevance = Relevance.from_pairs(np.arange(len(owners)), owners, len(owners))
    first = ranks(texts.embeddings, products.embeddings, relevance, owners=products.owners, top_k=candidates)
    retrieved = Candidates.among(first, relevance, owners, np.arange(size), candidates)
    second = retrieved.reordered(second_stage(retrieved))
    before, after = (metrics.per_query(stage.ranks, relevance.indptr, ks) for stage in (first, second))
    changes = {"retrieved": retrieved.found, **rank_changes(first.ranks, second.ranks)}
    reranked = {"k": retrieved.items.shape[1], **means(changes, seed), "compared": differences(before, after, seed)}
    return {
        "text_to_image": _figures(second, relevance, ks, seed),
        "first_stage": _figures(first, relevance, ks, seed),
        "reranked": reranked,
        **_sizes(owners, keys, size, ks),
    }


def _sizes(owners: np.ndarray, keys: Sequence, size: int, ks: Sequence[int]) -> dict[str, Any]:
    """Returns the figures from text to image that do not depend on a ranking."""
    return {
        "chance": chance(np.ones(len(owners), int), size, ks),
        "ceiling": {f"hit@{k}": metrics.hit_ceiling(keys, owners, k) for k in ks},
        "queries": len(owners),
        "gallery": size,
    }


def _figures(found: Ranks, relevance: Relevance, ks: Sequence[int], seed: int) -> dict[str, Any]:
    values = metrics.per_query(found.ranks, relevance.indptr, ks)
    return figures(metrics.best_rank(found.ranks, relevance.indptr), values, seed)
