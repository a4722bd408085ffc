"""The rerank protocol: only what the first stage retrieved is re-ordered, all else stays where it was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.evaluation import protocols
from jaxclip.ranking import candidates as second_stage
from jaxclip.ranking import metrics


def embeddings(seed, queries=60, gallery=40, groups=30):
    random = np.random.default_rng(seed)
    image_groups = np.concatenate([np.arange(groups), random.integers(groups, size=gallery - groups)])
    text_groups = np.concatenate([np.arange(groups), random.integers(groups, size=queries - groups)])
    images = random.normal(size=(gallery, 8)).astype(np.float32)
    texts = random.normal(size=(queries, 8)).astype(np.float32)
    return texts, images, text_groups, image_groups


def retrieve(seed=0, k=10, **sizes):
    return second_stage.retrieve(*embeddings(seed, **sizes), k)


def grouped(seed):
    texts, images, text_groups, image_groups = embeddings(seed)
    return protocols.GroupedEmbeddings(texts, text_groups), protocols.GroupedEmbeddings(images, image_groups)


def evaluate(score, seed=0, k=10, categories=None, **options):
    """Returns the metrics and details of re-ranking by score(candidates)."""
    texts, images = grouped(seed)
    categories = categories or [""] * len(texts.embeddings)
    return protocols.evaluate(texts, images, categories, second_stage=score, candidates=k, **options)


def test_candidates_are_the_exact_top_k_and_nothing_else():
    texts, images, text_groups, image_groups = embeddings(0)
    found = retrieve()
    expected = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found.items, expected)
    np.testing.assert_array_equal(found.relevant, image_groups[expected] == text_groups[:, None])
    assert 0.1 < found.found.mean() < 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 10, 40]), st.sampled_from([1, 4, 100]))
def test_ranks_after_reordering_are_those_of_the_whole_list(seed, k, levels):
    found = retrieve(seed, k)
    random = np.random.default_rng(seed)
    scores = random.integers(levels, size=found.items.shape).astype(np.float32)  # with ties
    after = found.reordered(scores)
    relevance, before = found.relevance, found.first.ranks
    for query in range(len(found.items)):
        span = slice(relevance.indptr[query], relevance.indptr[query + 1])
        order = sorted(range(k), key=lambda place: (-scores[query, place], found.relevant[query, place], place))  # noqa: B023
        position = {int(found.items[query, place]): rank for rank, place in enumerate(order, 1)}
        expected = [
            position.get(int(item), old) for item, old in zip(relevance.indices[span], before[span], strict=True)
        ]
        assert after.ranks[span].tolist() == expected and len(set(expected)) == len(expected)
    assert (np.diff(after.top_scores, axis=1) <= 0).all()
    np.testing.assert_array_equal(np.sort(after.top_items, axis=1), np.sort(found.items, axis=1))


def test_the_first_stages_own_scores_change_nothing():
    found = retrieve(3)
    after = found.reordered(found.scores)
    np.testing.assert_array_equal(after.ranks, found.first.ranks)
    np.testing.assert_array_equal(after.top_items, found.first.top_items)
    result, details = evaluate(lambda candidates: candidates.scores, seed=3)
    plain, _ = protocols.evaluate(*grouped(3), [""] * 60)
    assert result["reranked"]["unchanged"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["text_to_image"] == result["first_stage"] == plain["text_to_image"]
    assert result["image_to_text"] == plain["image_to_text"] and result["by_category"] == plain["by_category"]
    np.testing.assert_array_equal(details.text_to_image.top_items, details.first_stage.top_items)


def test_no_order_brings_back_an_answer_that_the_first_stage_did_not_retrieve():
    found = retrieve(1)
    result, details = evaluate(lambda candidates: candidates.relevant.astype(np.float32), seed=1)
    before, after = details.first_stage, details.text_to_image
    retrieved = metrics.hit(found.first.ranks, found.relevance.indptr, 10)
    np.testing.assert_array_equal(after.values["hit@1"], retrieved)
    assert result["text_to_image"]["hit@1"]["value"] == result["reranked"]["retrieved"]["value"] == retrieved.mean() < 1
    missed = retrieved == 0
    np.testing.assert_array_equal(after.best_ranks[missed], before.best_ranks[missed])
    assert (after.best_ranks[missed] > 10).all()
    np.testing.assert_array_equal(np.sort(after.top_items, axis=1), np.sort(before.top_items, axis=1))


def test_an_answer_that_ties_with_the_last_candidate_was_not_retrieved():
    images = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    groups, query = np.array([1, 2, 0, 3]), np.array([[1, 0]], np.float32)
    for k, retrieved in ((1, False), (2, False), (3, True), (4, True)):
        found = second_stage.retrieve(query, images, np.array([0]), groups, k)
        assert found.first.ranks.tolist() == [3] and found.found.tolist() == [retrieved]
        assert found.reordered(found.relevant.astype(np.float32)).ranks.tolist() == [1 if retrieved else 3]
    twins = second_stage.retrieve(query, images, np.array([0]), np.array([1, 0, 0, 3]), 2)  # ranks 2 and 3
    assert sorted(twins.first.ranks) == [2, 3] and twins.relevant.sum() == 1
    assert sorted(twins.reordered(twins.relevant.astype(np.float32)).ranks) == [1, 3]


def test_nan_scores_rank_last_and_equal_scores_are_pessimistic():
    found = retrieve(2)
    query = int(np.flatnonzero(found.found)[0])
    scores = np.zeros(found.items.shape, np.float32)
    best = metrics.best_rank(found.reordered(scores).ranks, found.relevance.indptr)[query]
    assert best == 10 - found.relevant[query].sum() + 1
    scores = np.where(found.relevant, np.nan, scores)
    best = metrics.best_rank(found.reordered(scores).ranks, found.relevance.indptr)[query]
    assert best == 10 - found.relevant[query].sum() + 1


def test_what_stands_behind_few_candidates_stays_there_and_scores_of_another_shape_are_refused():
    first = protocols.evaluate(*grouped(0), [""] * 60)[1].text_to_image
    result, details = evaluate(lambda candidates: -candidates.scores, k=5, categories=["shoes", ""] * 30)
    np.testing.assert_array_equal(details.text_to_image.top_items[:, :5], first.top_items[:, 4::-1])
    np.testing.assert_array_equal(details.text_to_image.top_items[:, 5:], first.top_items[:, 5:])
    assert result["text_to_image"]["hit@10"] == result["first_stage"]["hit@10"]
    assert set(result["by_category"]) == {"shoes", "(none)"} and result["reranked"]["k"] == 5
    with pytest.raises(ValueError, match="scores"):
        evaluate(lambda candidates: candidates.scores[:, :4])


def test_shares_are_of_the_queries_that_moved():
    result, details = evaluate(lambda candidates: -candidates.scores, seed=4, k=40)
    before, after = details.first_stage.best_ranks, details.text_to_image.best_ranks
    shares = result["reranked"]
    for name, of_queries in (
        ("improved", after < before),
        ("unchanged", after == before),
        ("worsened", after > before),
    ):
        assert shares[name]["value"] == pytest.approx(of_queries.mean())
        assert shares[name]["low"] <= shares[name]["value"] <= shares[name]["high"]
        assert shares[name]["low"] < shares[name]["high"] or of_queries.mean() in (0, 1)
