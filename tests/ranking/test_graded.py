"""Metrics from graded judgements equal trec_eval's; equal scores are pessimistic."""

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.ranking import graded
from jaxclip.ranking.graded import Judged, answered, per_query
from jaxclip.ranking.ranks import ranks
from jaxclip.ranking.relevance import Relevance


@st.composite
def judged_files(draw):
    """Returns for each query its grades by product, and the order in which its products were found."""
    queries = []
    for _ in range(draw(st.integers(1, 6))):
        found = draw(st.permutations(range(draw(st.integers(1, 15)))))
        products = st.integers(0, 19)  # those from 15 on are never found
        queries.append((draw(st.dictionaries(products, st.integers(0, 4), min_size=1, max_size=12)), found))
    return queries


def read(queries):
    """Returns the judgements of `judged_files`."""
    indptr = np.cumsum([0] + [len(grades) for grades, _ in queries])
    rank = [found.index(item) + 1 if item in found else np.inf for grades, found in queries for item in grades]
    return Judged(indptr, [grade for grades, _ in queries for grade in grades.values()], rank)


@settings(deadline=None)
@given(judged_files(), st.integers(1, 18), st.sampled_from([0, 2]))
def test_graded_metrics_equal_those_of_trec_eval(queries, k, threshold):
    truth = {f"q{q}": {f"p{item}": grade for item, grade in grades.items()} for q, (grades, _) in enumerate(queries)}
    run = {
        f"q{q}": {f"p{item}": float(-place) for place, item in enumerate(found)} for q, (_, found) in enumerate(queries)
    }
    names = {f"hit@{k}": f"success_{k}", "mrr": "recip_rank", "map": "map", f"recall@{k}": f"recall_{k}"}
    names |= {f"precision@{k}": f"P_{k}"}
    measures = {"recip_rank", "map", f"success.{k}", f"recall.{k}", f"P.{k}"}
    theirs = pytrec_eval.RelevanceEvaluator(truth, measures, relevance_level=threshold + 1).evaluate(run)
    ours = per_query(read(queries), ks=(k,), threshold=threshold)
    assert ours.keys() == {*names, f"ndcg@{k}", f"judged@{k}"}
    for name, trec_name in names.items():
        expected = [theirs[f"q{q}"][trec_name] for q in range(len(queries))]
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-9, err_msg=name)
    for gain in graded.GAINS:
        gains = {
            query: {item: grade if gain == "linear" else 2**grade - 1 for item, grade in grades.items()}
            for query, grades in truth.items()
        }
        theirs = pytrec_eval.RelevanceEvaluator(gains, {f"ndcg_cut.{k}"}).evaluate(run)
        expected = [theirs[f"q{q}"][f"ndcg_cut_{k}"] for q in range(len(queries))]
        np.testing.assert_allclose(graded.ndcg(read(queries), k, gain), expected, rtol=0, atol=1e-9)
    shares = [sum(item in grades for item in found[:k]) / k for grades, found in queries]
    np.testing.assert_allclose(ours[f"judged@{k}"], shares)
    relevant = [any(grade > threshold for grade in grades.values()) for grades, _ in queries]
    assert answered(read(queries), threshold).tolist() == relevant


def test_a_query_without_judgements_has_no_answer_and_no_gain():
    judged = Judged([0, 0, 2, 2], [0.5, 0.0], [2, 1])
    assert answered(judged).tolist() == [False, True, False]
    values = per_query(judged, ks=(1, 2))
    assert {name: value.tolist() for name, value in values.items() if name in ("mrr", "hit@2", "judged@1")} == {
        "mrr": [0, 0.5, 0],
        "hit@2": [0, 1, 0],
        "judged@1": [0, 1, 0],
    }
    assert values["ndcg@2"].tolist() == [0, 1 / np.log2(3), 0]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_scores_rank_unjudged_products_first_and_then_lower_grades(seed):
    random = np.random.default_rng(seed)
    scores = random.integers(-1, 2, (6, 20)).astype(np.float32)
    scores[random.random(scores.shape) < 0.1] = np.nan
    grades = np.where(random.random(scores.shape) < 0.5, random.integers(0, 3, scores.shape), -1)  # -1: not judged
    grades[:, 0] = 1
    relevance = Relevance.from_pairs(*np.nonzero(grades >= 0), queries=6)
    # The product of the identity and the gallery is the scores; a NaN would spread, so that a lower number replaces it.
    found = ranks(np.eye(6, dtype=np.float32), np.nan_to_num(scores.T, nan=-9), relevance)
    pair_scores = scores[relevance.rows, relevance.indices]
    np.testing.assert_array_equal(found.scores, np.nan_to_num(pair_scores, nan=-9))
    judged = Judged(relevance.indptr, grades[relevance.rows, relevance.indices], found.ranks).pessimistic(pair_scores)
    for row in range(6):
        keys = np.nan_to_num(scores[row], nan=-9)
        order = np.lexsort((np.arange(20), grades[row], -keys))
        expected = 1 + np.argsort(order)
        mine = slice(*relevance.indptr[row : row + 2])
        items = relevance.indices[mine]
        # Products of equal score and grade are equivalent: compare the sets of their ranks.
        groups = {(keys[item], grades[row, item]) for item in items}
        for group in groups:
            same = [(keys[item], grades[row, item]) == group for item in items]
            assert sorted(judged.ranks[mine][same]) == sorted(expected[items[same]])


def test_products_outside_the_gallery_stay_outside():
    judged = Judged([0, 4], [0, 2, 1, 0], [np.inf, 1, 2, 3]).pessimistic(np.array([np.nan, 5.0, 5.0, np.nan]))
    assert judged.ranks.tolist() == [np.inf, 2, 1, 3]


def test_wrong_judgements_are_refused():
    with pytest.raises(ValueError, match="2 grades and ranks expected"):
        Judged([0, 2], [1.0], [1, 2])
    for grades, rank in (([-1.0], [1]), ([np.nan], [1]), ([1.0], [0]), ([1.0], [np.nan])):
        with pytest.raises(ValueError, match="grades must be finite and at least 0, ranks at least 1"):
            Judged([0, 1], grades, rank)
    with pytest.raises(ValueError, match="rise from 0"):
        Judged([0, 2, 1], [1.0], [1])
    with pytest.raises(ValueError, match="'log' must be one of linear, exponential"):
        graded.ndcg(Judged([0, 1], [1.0], [1]), 3, "log")
