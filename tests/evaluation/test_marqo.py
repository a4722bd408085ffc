"""Marqo's protocol equals a direct implementation of its definition."""

import numpy as np
import pytest

from jaxclip.evaluation import marqo
from jaxclip.evaluation.protocols import GroupedEmbeddings


def unit_vectors(random, *shape):
    rows = random.standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_documents_mix_image_and_title_and_recall_is_of_all_relevant_documents():
    random = np.random.default_rng(0)
    images, titles = unit_vectors(random, 90, 8), unit_vectors(random, 90, 8)
    groups = np.arange(90) // 3
    texts, text_groups = titles[::2] + 0.8 * unit_vectors(random, 45, 8), groups[::2]
    figures = marqo.evaluate(GroupedEmbeddings(texts, text_groups), GroupedEmbeddings(images, groups), titles)
    documents = 0.9 * images + 0.1 * titles
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    order = np.argsort(-(texts @ documents.T), axis=1)
    relevant = groups[order] == text_groups[:, None]  # (Q, G), columns in order of rank
    best_rank = 1 + relevant.argmax(axis=1)
    assert figures["queries"] == 45 and figures["documents"] == 90
    assert figures["recall@1"]["value"] == pytest.approx((relevant[:, :1].sum(1) / 3).mean(), abs=1e-9)
    assert figures["recall@10"]["value"] == pytest.approx((relevant[:, :10].sum(1) / 3).mean(), abs=1e-9)
    assert figures["mrr@10"]["value"] == pytest.approx(np.where(best_rank <= 10, 1 / best_rank, 0).mean(), abs=1e-9)


def test_at_most_2000_texts_are_sampled_and_the_seed_determines_them():
    random = np.random.default_rng(1)
    images = unit_vectors(random, 2100, 4)
    groups = np.arange(2100)
    texts = images + 0.3 * unit_vectors(random, 2100, 4)
    grouped = GroupedEmbeddings(texts, groups), GroupedEmbeddings(images, groups)
    first, again, other = (marqo.evaluate(*grouped, images, seed=seed) for seed in (0, 0, 1))
    assert first["queries"] == 2000 and first == again
    assert first["mrr@10"]["value"] != other["mrr@10"]["value"]
