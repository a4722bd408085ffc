"""The protocol of Marqo's fashion leaderboard: sampled texts search products embedded as image plus title."""

import numpy as np

from jaxclip.evaluation.protocols import GroupedEmbeddings, means
from jaxclip.ranking import metrics
from jaxclip.ranking.ranks import ranks
from jaxclip.ranking.relevance import Relevance

MAX_TEXTS, IMAGE_WEIGHT = 2000, 0.9


def evaluate(texts: GroupedEmbeddings, images: GroupedEmbeddings, titles, *, seed: int = 0) -> dict:
    """Returns recall@1, recall@10 and MRR@10 of at most 2,000 sampled texts.

    Recall is defined as in BEIR: relevant documents in the top k / all relevant documents. A document is
    normalise(0.9 image + 0.1 title), so a query that is its product's title is also part of the document that it should
    retrieve. Compare these figures only with figures of the same protocol (github.com/marqo-ai/marqo-FashionCLIP).

    Args:
      texts: the Q texts.
      images: the G products, each picture of which is a document of its product.
      titles: (G, D) unit vectors of the products' titles, zero for products without a title.
      seed: seeds the sampling of the texts and the bootstrap.
    """
    random = np.random.default_rng(seed)
    sample = np.sort(random.choice(len(texts.embeddings), min(MAX_TEXTS, len(texts.embeddings)), replace=False))
    titles = np.asarray(titles) if images.owners is None else np.asarray(titles)[images.owners]
    documents = IMAGE_WEIGHT * images.embeddings + (1 - IMAGE_WEIGHT) * titles
    documents = documents / np.maximum(np.linalg.norm(documents, axis=1, keepdims=True), 1e-12)
    relevance = Relevance.from_groups(texts.groups[sample], images.groups)
    text_ranks = ranks(texts.embeddings[sample], documents, relevance, owners=images.owners).ranks
    reciprocal = metrics.reciprocal_rank(text_ranks, relevance.indptr)
    values = {f"recall@{k}": metrics.recall(text_ranks, relevance.indptr, k) for k in (1, 10)}
    values["mrr@10"] = np.where(metrics.best_rank(text_ranks, relevance.indptr) <= 10, reciprocal, 0.0)
    return {"queries": len(sample), "documents": len(images.groups), "image_weight": IMAGE_WEIGHT} | means(values, seed)
