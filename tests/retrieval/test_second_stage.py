"""The rerank protocol: only what the first stage retrieved is re-ordered, all else stays where it was."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.retrieval import metrics, second_stage


def embeddings(seed, queries=60, gallery=40, groups=30):
    random = np.random.default_rng(seed)
    image_groups = np.concatenate([np.arange(groups), random.integers(groups, size=gallery - groups)])
    text_groups = random.integers(groups, size=queries)
    images = random.normal(size=(gallery, 8)).astype(np.float32)
    texts = random.normal(size=(queries, 8)).astype(np.float32)
    return texts, images, text_groups, image_groups


def retrieve(seed=0, k=10, **sizes):
    return second_stage.retrieve(*embeddings(seed, **sizes), k)


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
    after = second_stage.reordered(found, scores)
    relevance, before = found.relevance, found.first.ranks
    for query in range(len(found.items)):
        span = slice(relevance.indptr[query], relevance.indptr[query + 1])
        order = sorted(range(k), key=lambda place: (-scores[query, place], found.relevant[query, place], place))  # noqa: B023
        position = {int(found.items[query, place]): rank for rank, place in enumerate(order, 1)}
        expected = [
            position.get(int(item), old) for item, old in zip(relevance.indices[span], before[span], strict=True)
        ]
        assert after[span].tolist() == expected and len(set(expected)) == len(expected)


def test_the_first_stages_own_scores_change_nothing():
    found = retrieve(3)
    np.testing.assert_array_equal(second_stage.reordered(found, found.scores), found.first.ranks)
    result, _ = second_stage.evaluate(found, found.scores, [""] * len(found.items))
    assert result["reranked"]["unchanged"] == 1.0 and result["text_to_image"] == result["first_stage"]


def test_no_order_brings_back_an_answer_that_the_first_stage_did_not_retrieve():
    found = retrieve(1)
    oracle = found.relevant.astype(np.float32)
    result, per_query = second_stage.evaluate(found, oracle, [""] * len(found.items))
    retrieved = metrics.hit(found.first.ranks, found.relevance.indptr, 10)
    np.testing.assert_array_equal(per_query["text_to_image"]["hit@1"], retrieved)
    assert result["text_to_image"]["hit@1"]["value"] == result["reranked"]["retrieved"] == retrieved.mean() < 1
    missed = retrieved == 0
    for name in ("best_rank", "mrr"):
        np.testing.assert_array_equal(per_query["text_to_image"][name][missed], per_query["first_stage"][name][missed])
    assert (per_query["text_to_image"]["best_rank"][missed] > 10).all()


def test_nan_scores_rank_last_and_equal_scores_are_pessimistic():
    found = retrieve(2)
    query = int(np.flatnonzero(found.found)[0])
    scores = np.zeros(found.items.shape, np.float32)
    best = metrics.best_rank(second_stage.reordered(found, scores), found.relevance.indptr)[query]
    assert best == 10 - found.relevant[query].sum() + 1
    scores = np.where(found.relevant, np.nan, scores)
    best = metrics.best_rank(second_stage.reordered(found, scores), found.relevance.indptr)[query]
    assert best == 10 - found.relevant[query].sum() + 1


def test_depths_beyond_the_candidates_are_left_out_and_scores_of_another_shape_are_refused():
    found = retrieve(0, k=5)
    result, _ = second_stage.evaluate(found, found.scores, ["shoes", ""] * 30)
    assert "hit@5" in result["text_to_image"] and "hit@10" not in result["text_to_image"]
    assert set(result["by_category"]) == {"shoes", "(none)"}
    assert "improved" in second_stage.table(result)
    with pytest.raises(ValueError, match="scores"):
        second_stage.reordered(found, found.scores[:, :4])


def test_shares_and_p_values_are_of_the_queries_that_moved():
    found = retrieve(4, k=40)
    result, per_query = second_stage.evaluate(found, -found.scores, [""] * 60)
    before, after = (per_query[stage]["best_rank"] for stage in ("first_stage", "text_to_image"))
    shares = result["reranked"]
    assert shares["improved"] == (after < before).mean() and shares["worsened"] == (after > before).mean()
    assert shares["improved"] + shares["unchanged"] + shares["worsened"] == pytest.approx(1)
    oracle, _ = second_stage.evaluate(found, found.relevant.astype(np.float32), [""] * 60)
    compared = oracle["reranked"]["compared"]["hit@1"]
    assert compared["difference"] == pytest.approx(1 - oracle["first_stage"]["hit@1"]["value"])
    assert compared["p"] < 0.001
