"""The protocol of Marqo's fashion leaderboard: sampled texts against products of image and text, BEIR's figures."""

from collections.abc import Sequence

import numpy as np

from jaxclip.evaluation.protocols import means
from jaxclip.ranking import metrics
from jaxclip.ranking.ranks import ranks
from jaxclip.ranking.relevance import Relevance

TEXTS, IMAGE_WEIGHT = 2000, 0.9


def evaluate(texts, images, titles, text_groups: Sequence, image_groups: Sequence, *, seed: int = 0) -> dict:
    """Returns recall@1, recall@10 (BEIR: |right in the top k| / |right|) and MRR@10 of up to 2,000 sampled texts.

    A document is normalise(0.9 image + 0.1 title), so a query that is its product's title has a part in its own answer:
    figures of this protocol stand beside those of the same protocol only (github.com/marqo-ai/marqo-FashionCLIP).

    Args:
      texts: (Q, D) unit vectors. images: (G, D) unit vectors. titles: (G, D) unit vectors of the products' own text.
      text_groups: (Q,). image_groups: (G,).
      seed: of the sample.
    """
    random = np.random.default_rng(seed)
    sample = np.sort(random.choice(len(texts), min(TEXTS, len(texts)), replace=False))
    documents = IMAGE_WEIGHT * np.asarray(images) + (1 - IMAGE_WEIGHT) * np.asarray(titles)
    documents = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
    relevance = Relevance.from_groups(np.asarray(text_groups)[sample], image_groups)
    found = ranks(np.asarray(texts)[sample], documents, relevance).ranks
    reciprocal = metrics.reciprocal_rank(found, relevance.indptr)
    values = {f"recall@{k}": metrics.recall(found, relevance.indptr, k) for k in (1, 10)}
    values["mrr@10"] = np.where(metrics.best_rank(found, relevance.indptr) <= 10, reciprocal, 0.0)
    return {"queries": len(sample), "documents": len(documents), "image_weight": IMAGE_WEIGHT} | means(values, seed)
