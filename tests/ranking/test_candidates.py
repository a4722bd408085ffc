"""The rerank protocol re-orders only the candidates that the first stage retrieved; other items keep their ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.evaluation import protocols
from jaxclip.ranking import candidates, metrics


def random_split(seed, queries=60, gallery=40, groups=30):
    """Returns text and image embeddings and their groups; every group has at least one text and one image."""
    random = np.random.default_rng(seed)
    image_groups = np.concatenate([np.arange(groups), random.integers(groups, size=gallery - groups)])
    text_groups = np.concatenate([np.arange(groups), random.integers(groups, size=queries - groups)])
    images = random.normal(size=(gallery, 8)).astype(np.float32)
    texts = random.normal(size=(queries, 8)).astype(np.float32)
    return texts, images, text_groups, image_groups


def retrieve(seed=0, k=10):
    return candidates.retrieve(*random_split(seed), k)


def grouped_embeddings(seed):
    texts, images, text_groups, image_groups = random_split(seed)
    return protocols.GroupedEmbeddings(texts, text_groups), protocols.GroupedEmbeddings(images, image_groups)


def evaluate(score, seed=0, k=10, categories=None, **options):
    """Returns the metrics and details of re-ranking the top k by score(candidates)."""
    texts, images = grouped_embeddings(seed)
    categories = categories or [""] * len(texts.embeddings)
    return protocols.evaluate(texts, images, categories, second_stage=score, candidates=k, **options)


def test_candidates_are_the_exact_top_k():
    texts, images, text_groups, image_groups = random_split(0)
    retrieved = retrieve()
    expected = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(retrieved.items, expected)
    np.testing.assert_array_equal(retrieved.relevant, image_groups[expected] == text_groups[:, None])
    assert 0.1 < retrieved.found.mean() < 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 10, 40]), st.sampled_from([1, 4, 100]))
def test_ranks_after_reordering_equal_those_of_a_sorted_list(seed, k, levels):
    retrieved = retrieve(seed, k)
    random = np.random.default_rng(seed)
    scores = random.integers(levels, size=retrieved.items.shape).astype(np.float32)  # with ties
    after = retrieved.reordered(scores)
    relevance, before = retrieved.relevance, retrieved.first.ranks
    for query in range(len(retrieved.items)):
        span = slice(relevance.indptr[query], relevance.indptr[query + 1])
        order = sorted(range(k), key=lambda place: (-scores[query, place], retrieved.relevant[query, place], place))  # noqa: B023
        position = {int(retrieved.items[query, place]): rank for rank, place in enumerate(order, 1)}
        expected = [
            position.get(int(item), first_rank)
            for item, first_rank in zip(relevance.indices[span], before[span], strict=True)
        ]
        assert after.ranks[span].tolist() == expected and len(set(expected)) == len(expected)
    assert (np.diff(after.top_scores, axis=1) <= 0).all()
    np.testing.assert_array_equal(np.sort(after.top_items, axis=1), np.sort(retrieved.items, axis=1))


def test_reordering_by_the_first_stages_scores_changes_nothing():
    retrieved = retrieve(3)
    after = retrieved.reordered(retrieved.scores)
    np.testing.assert_array_equal(after.ranks, retrieved.first.ranks)
    np.testing.assert_array_equal(after.top_items, retrieved.first.top_items)
    result, details = evaluate(lambda candidates: candidates.scores, seed=3)
    plain, _ = protocols.evaluate(*grouped_embeddings(3), [""] * 60)
    assert result["reranked"]["unchanged"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["text_to_image"] == result["first_stage"] == plain["text_to_image"]
    assert result["image_to_text"] == plain["image_to_text"] and result["by_category"] == plain["by_category"]
    np.testing.assert_array_equal(details.text_to_image.top_items, details.first_stage.top_items)


def test_reordering_cannot_recover_an_answer_that_was_not_retrieved():
    first_stage = retrieve(1)
    result, details = evaluate(lambda candidates: candidates.relevant.astype(np.float32), seed=1)
    before, after = details.first_stage, details.text_to_image
    retrieved = metrics.hit(first_stage.first.ranks, first_stage.relevance.indptr, 10)
    np.testing.assert_array_equal(after.values["hit@1"], retrieved)
    assert result["text_to_image"]["hit@1"]["value"] == result["reranked"]["retrieved"]["value"] == retrieved.mean() < 1
    missed = retrieved == 0
    np.testing.assert_array_equal(after.best_ranks[missed], before.best_ranks[missed])
    assert (after.best_ranks[missed] > 10).all()
    np.testing.assert_array_equal(np.sort(after.top_items, axis=1), np.sort(before.top_items, axis=1))


def test_an_answer_that_ties_with_the_last_candidate_is_not_retrieved():
    images = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    groups, query = np.array([1, 2, 0, 3]), np.array([[1, 0]], np.float32)
    for k, retrieved in ((1, False), (2, False), (3, True), (4, True)):
        top = candidates.retrieve(query, images, np.array([0]), groups, k)
        assert top.first.ranks.tolist() == [3] and top.found.tolist() == [retrieved]
        assert top.reordered(top.relevant.astype(np.float32)).ranks.tolist() == [1 if retrieved else 3]
    two_answers = candidates.retrieve(query, images, np.array([0]), np.array([1, 0, 0, 3]), 2)  # ranks 2 and 3
    assert sorted(two_answers.first.ranks) == [2, 3] and two_answers.relevant.sum() == 1
    assert sorted(two_answers.reordered(two_answers.relevant.astype(np.float32)).ranks) == [1, 3]


def test_nan_scores_rank_last_and_ties_are_pessimistic():
    retrieved = retrieve(2)
    query = int(np.flatnonzero(retrieved.found)[0])
    scores = np.zeros(retrieved.items.shape, np.float32)
    best = metrics.best_rank(retrieved.reordered(scores).ranks, retrieved.relevance.indptr)[query]
    assert best == 10 - retrieved.relevant[query].sum() + 1
    scores = np.where(retrieved.relevant, np.nan, scores)
    best = metrics.best_rank(retrieved.reordered(scores).ranks, retrieved.relevance.indptr)[query]
    assert best == 10 - retrieved.relevant[query].sum() + 1


def test_items_after_the_candidates_keep_their_places_and_scores_of_another_shape_are_refused():
    first = protocols.evaluate(*grouped_embeddings(0), [""] * 60)[1].text_to_image
    result, details = evaluate(lambda candidates: -candidates.scores, k=5, categories=["shoes", ""] * 30)
    np.testing.assert_array_equal(details.text_to_image.top_items[:, :5], first.top_items[:, 4::-1])
    np.testing.assert_array_equal(details.text_to_image.top_items[:, 5:], first.top_items[:, 5:])
    assert result["text_to_image"]["hit@10"] == result["first_stage"]["hit@10"]
    assert set(result["by_category"]) == {"shoes", "(none)"} and result["reranked"]["k"] == 5
    with pytest.raises(ValueError, match="scores"):
        evaluate(lambda candidates: candidates.scores[:, :4])


def test_the_shares_of_queries_that_improved_or_worsened_are_reported():
    result, details = evaluate(lambda candidates: -candidates.scores, seed=4, k=40)
    before, after = details.first_stage.best_ranks, details.text_to_image.best_ranks
    shares = result["reranked"]
    for name, happened in (
        ("improved", after < before),
        ("unchanged", after == before),
        ("worsened", after > before),
    ):
        assert shares[name]["value"] == pytest.approx(happened.mean())
        assert shares[name]["low"] <= shares[name]["value"] <= shares[name]["high"]
        assert shares[name]["low"] < shares[name]["high"] or happened.mean() in (0, 1)
