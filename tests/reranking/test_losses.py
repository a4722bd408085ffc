"""Losses of re-rankers equal their definitions, computed element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.reranking import losses


@pytest.fixture
def lists():
    random = np.random.default_rng(0)
    relevant = np.zeros((5, 12), bool)
    for row, places in enumerate([[0], [3], [11], [2, 5], [0, 1, 7]]):
        relevant[row, places] = True
    return random.normal(size=(5, 12)).astype(np.float32), relevant


def test_list_softmax_is_the_log_probability_of_all_relevant_candidates(lists):
    scores, relevant = lists
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    expected = -np.log((shares * relevant).sum(axis=1)).mean()
    np.testing.assert_allclose(losses.list_softmax(scores, relevant), expected, rtol=1e-5)


def test_lambda_loss_weighs_each_pair_by_the_ndcg_that_a_swap_would_cost(lists):
    scores, relevant = lists
    expected = []
    for score, right in zip(scores, relevant, strict=True):
        rank = np.empty(len(score))
        rank[np.argsort(-score)] = np.arange(1, len(score) + 1)
        ideal = (1 / np.log2(1 + np.arange(1, right.sum() + 1))).sum()

        def ndcg(rank, right=right, ideal=ideal):
            return (right / np.log2(1 + rank)).sum() / ideal

        total = 0.0
        for i in np.flatnonzero(right):
            for j in np.flatnonzero(~right):
                swapped = rank.copy()
                swapped[[i, j]] = rank[[j, i]]
                total += abs(ndcg(rank) - ndcg(swapped)) * np.log2(1 + np.exp(-(score[i] - score[j])))
        expected.append(total)
    np.testing.assert_allclose(losses.lambda_loss(scores, relevant), np.mean(expected), rtol=1e-5)


def test_binary_cross_entropy_is_that_of_a_sigmoid_and_stays_finite_for_large_scores():
    scores, relevant = jnp.array([0.3, -2.0, 500.0]), jnp.array([True, False, True])
    p = 1 / (1 + np.exp(-np.array([0.3, -2.0])))
    expected = -(np.log(p[0]) + np.log(1 - p[1])) / 3
    np.testing.assert_allclose(losses.binary_cross_entropy(scores, relevant), expected, rtol=1e-5)


@pytest.mark.parametrize("negatives", losses.NEGATIVES)
def test_a_pair_is_a_relevant_candidate_and_one_that_is_not(lists, negatives):
    _, relevant = lists
    pairs = jax.vmap(lambda key: losses.sample_pair(relevant, negatives, key))(jax.random.split(jax.random.key(0), 200))
    rows = np.arange(5)
    assert relevant[rows, pairs[..., 0]].all() and not relevant[rows, pairs[..., 1]].any()
    assert {int(place) for place in pairs[:, 4, 0]} == {0, 1, 7}
    last = [11, 11, 10, 11, 11]
    expected = {
        "worst": [{place} for place in last],
        "top": [set(np.flatnonzero(~row)[:10]) for row in relevant],
        "random": [set(np.flatnonzero(~row)) for row in relevant],
        "mixed": [set(np.flatnonzero(~row)) for row in relevant],
    }[negatives]
    assert [set(np.asarray(pairs[:, row, 1]).tolist()) for row in rows] == expected


def test_gradients_raise_the_scores_of_relevant_candidates_only(lists):
    scores, relevant = lists
    for loss in (losses.list_softmax, losses.lambda_loss):
        gradient = np.asarray(jax.grad(loss)(jnp.asarray(scores), jnp.asarray(relevant)))
        assert (gradient[relevant] < 0).all() and (gradient[~relevant] >= 0).all()


def test_sampled_candidates_are_distinct_and_the_first_is_relevant(lists):
    _, relevant = lists
    for key in jax.random.split(jax.random.key(1), 20):
        sampled = np.asarray(losses.sample_candidates(relevant, 4, key))
        assert sampled.shape == (5, 4) and all(len(set(row)) == 4 for row in sampled.tolist())
        assert relevant[np.arange(5), sampled[:, 0]].all()
    assert sorted(np.asarray(losses.sample_candidates(relevant, 50, key))[0].tolist()) == list(range(12))


def test_the_contrastive_loss_is_the_mean_over_queries_and_over_answers():
    random = np.random.default_rng(0)
    scores, groups = random.normal(size=(6, 6)).astype(np.float32), np.array([0, 1, 2, 2, 3, 4])
    relevant = groups[:, None] == groups
    shares = [np.exp(s) / np.exp(s).sum(axis=1, keepdims=True) for s in (scores, scores.T)]
    expected = np.mean([-np.log((share * relevant).sum(axis=1)).mean() for share in shares])
    np.testing.assert_allclose(losses.contrastive(scores, relevant), expected, rtol=1e-5)
