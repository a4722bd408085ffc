"""Metrics computed from ranks equal their definitions, query by query, and trec_eval's."""

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.ranking import metrics
from jaxclip.ranking.ranks import ranks
from jaxclip.ranking.relevance import Relevance


@st.composite
def rankings(draw):
    """Returns for each query the distinct ranks of its relevant items."""
    size = draw(st.integers(1, 15))
    subsets = st.lists(st.integers(1, size), min_size=1, max_size=size, unique=True)
    return draw(st.lists(subsets, min_size=1, max_size=6))


@given(rankings(), st.integers(1, 12))
def test_metrics_equal_their_definitions(rows, k):
    ranks = np.concatenate([np.array(row) for row in rows])
    indptr = np.cumsum([0] + [len(row) for row in rows])
    expected = {
        f"hit@{k}": [float(min(row) <= k) for row in rows],
        "mrr": [1 / min(row) for row in rows],
        "map": [np.mean([sum(other <= rank for other in row) / rank for rank in row]) for row in rows],
        f"recall@{k}": [sum(rank <= k for rank in row) / len(row) for row in rows],
        f"precision@{k}": [sum(rank <= k for rank in row) / k for row in rows],
        f"ndcg@{k}": [
            sum(1 / math.log2(rank + 1) for rank in row if rank <= k)
            / sum(1 / math.log2(place + 1) for place in range(1, min(k, len(row)) + 1))
            for row in rows
        ],
    }
    measured = metrics.per_query(ranks, indptr, ks=(k,))
    assert measured.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(measured[name], values, err_msg=name)
    assert metrics.best_rank(ranks, indptr).tolist() == [min(row) for row in rows]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 40))
def test_chance_equals_the_binomial_formula(counts, k):
    drawn = min(k, 30)
    expected = np.mean([1 - math.comb(30 - count, drawn) / math.comb(30, drawn) for count in counts])
    assert metrics.chance_hit(np.array(counts), 30, k) == pytest.approx(expected, rel=1e-12)


def test_chance_is_accurate_for_a_large_gallery():
    assert metrics.chance_hit(np.array([1]), 10_000_000, 10) == pytest.approx(1e-6, rel=1e-9)


def test_chance_of_a_count_above_the_gallery_raises():
    with pytest.raises(ValueError, match="1..5"):
        metrics.chance_hit(np.array([6]), 5, 1)


@st.composite
def scored_queries(draw):
    """Returns scores (Q, G) with many ties, and for each query its relevant items, at least one."""
    size = draw(st.integers(1, 15))
    scores = st.lists(st.integers(-2, 2), min_size=size, max_size=size)
    relevant = st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True)
    queries = draw(st.lists(st.tuples(scores, relevant), min_size=1, max_size=6))
    return np.array([scores for scores, _ in queries], np.float32), [sorted(items) for _, items in queries]


@settings(max_examples=60, deadline=None)
@given(scored_queries(), st.integers(1, 12))
def test_metrics_of_ranks_with_ties_equal_those_of_trec_eval(case, k):
    scores, relevant = case
    indptr = np.cumsum([0] + [len(items) for items in relevant])
    # trec_eval sorts equal scores by descending name; with these names, irrelevant items come first, as in `ranks`.
    names = [[f"{'a' if item in items else 'b'}{item}" for item in range(scores.shape[1])] for items in relevant]
    truth = {f"q{q}": {names[q][item]: 1 for item in items} for q, items in enumerate(relevant)}
    run = {f"q{q}": dict(zip(names[q], map(float, scores[q]), strict=True)) for q in range(len(scores))}
    trec_names = {f"hit@{k}": f"success_{k}", "mrr": "recip_rank", "map": "map", f"recall@{k}": f"recall_{k}"}
    trec_names |= {f"precision@{k}": f"P_{k}", f"ndcg@{k}": f"ndcg_cut_{k}"}
    measures = {"recip_rank", "map", f"success.{k}", f"recall.{k}", f"P.{k}", f"ndcg_cut.{k}"}
    theirs = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(run)
    relevance = Relevance(indptr, np.concatenate(relevant))
    queries = np.eye(len(scores), dtype=np.float32)  # the product with the gallery scores.T is the scores
    ranked = ranks(queries, scores.T, relevance).ranks
    ours = metrics.per_query(ranked, indptr, ks=(k,))
    assert ours.keys() == trec_names.keys()
    for name, trec_name in trec_names.items():
        expected = [theirs[f"q{q}"][trec_name] for q in range(len(scores))]
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-9, err_msg=name)
