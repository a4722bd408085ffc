"""Metrics from ranks equal their definitions, written out query by query."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.retrieval import metrics


@st.composite
def rankings(draw):
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


def test_chance_keeps_its_digits_in_a_large_gallery():
    assert metrics.chance_hit(np.array([1]), 10_000_000, 10) == pytest.approx(1e-6, rel=1e-9)


def test_chance_of_an_impossible_count_raises():
    with pytest.raises(ValueError, match="1..5"):
        metrics.chance_hit(np.array([6]), 5, 1)


@settings(max_examples=30, deadline=None)
@given(rankings(), st.integers(1, 12))
def test_metrics_equal_those_of_ranx(rows, k):
    ranx = pytest.importorskip("ranx")
    right = {f"q{q}": {f"d{rank}": 1 for rank in row} for q, row in enumerate(rows)}
    found = {f"q{q}": {f"d{rank}": 1.0 / rank for rank in range(1, 16)} for q in range(len(rows))}
    names = {f"hit@{k}": f"hit_rate@{k}", "mrr": "mrr", "map": "map", f"recall@{k}": f"recall@{k}"}
    names |= {f"precision@{k}": f"precision@{k}", f"ndcg@{k}": f"ndcg@{k}"}
    theirs = ranx.evaluate(ranx.Qrels(right), ranx.Run(found), list(names.values()))
    ranks = np.concatenate([np.array(row) for row in rows])
    ours = metrics.per_query(ranks, np.cumsum([0] + [len(row) for row in rows]), ks=(k,))
    for our, their in names.items():
        assert ours[our].mean() == pytest.approx(theirs[their], abs=1e-9), our
