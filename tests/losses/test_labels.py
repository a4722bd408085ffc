"""Weights and queries of pairs change the losses and their gradients as a float64 oracle says, on any mesh."""

from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses import contrastive, exchange, sigmoid, tiled
from jaxclip.losses.contrastive import QueueWithQueries
from jaxclip.losses.labels import Labels, is_alike
from jaxclip.losses.objective import Incorrect, Objective
from jaxclip.runtime.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")
SCALE, BIAS, SIZE, QUEUED = 14.3, -3.0, 13, 9


def unit_vectors(rows, seed=0, dimension=8):
    vectors = np.random.default_rng(seed).normal(size=(2, rows, dimension))
    return tuple((vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32))


def random_labels(rows, seed=0):
    """Returns labels in which some pairs share a group, others a query, and a fifth have weight 0."""
    random = np.random.default_rng(seed)
    weight = random.uniform(0.1, 3.0, rows).astype(np.float32) * (random.random(rows) < 0.8)
    weight[0] = 1.5
    return Labels(*random.integers((0, -1), (rows, rows // 2), (rows, 2)).astype(np.int32).T, weight)


def random_queue(seed=5):
    group, query, _ = random_labels(QUEUED, seed)
    return QueueWithQueries(*unit_vectors(QUEUED, seed), np.where(np.arange(QUEUED) < 7, group, -1), query)


def alike(rows, columns):
    """Returns (R, C), in plain loops, whether a row and a column are no negatives of each other."""
    return np.asarray(
        [
            [g == h or (q == p and q >= 0) for h, p in zip(columns.group, columns.query, strict=True)]
            for g, q in zip(rows.group, rows.query, strict=True)
        ]
    )


def softmax_oracle(images, texts, labels, queue=None):
    """Returns weighted InfoNCE and its gradients by images, texts and scale, in float64, row by row."""
    images, texts, weight = np.float64(images), np.float64(texts), np.float64(labels.weight)
    gradients, value, by_scale = [np.zeros_like(images), np.zeros_like(texts)], 0.0, 0.0
    masked = alike(labels, labels)
    for side, (queries, gallery) in enumerate(((images, texts), (texts, images))):
        for row in range(len(images)):
            inside = [i for i in range(len(images)) if i == row or not masked[row, i]]
            candidates = gallery[inside]
            if queue is not None:
                usable = ~alike(labels, queue)[row] & (queue.group >= 0)
                candidates = np.concatenate([candidates, np.float64(queue[1 - side])[usable]])
            logits = SCALE * candidates @ queries[row]
            exponentials = np.exp(logits - logits.max())
            share = 0.5 * weight[row] / weight.sum()
            value += share * (np.log(exponentials.sum()) + logits.max() - SCALE * queries[row] @ gallery[row])
            slopes = exponentials / exponentials.sum()
            slopes[inside.index(row)] -= 1
            gradients[side][row] += share * SCALE * slopes @ candidates
            gradients[1 - side][inside] += share * SCALE * np.outer(slopes[: len(inside)], queries[row])
            by_scale += share * slopes @ candidates @ queries[row]
    return value, (*gradients, by_scale)


def sigmoid_oracle(images, texts, labels):
    """Returns the weighted sigmoid loss and its gradients by images, texts and scale, in float64, entry by entry."""
    images, texts, weight = np.float64(images), np.float64(texts), np.float64(labels.weight)
    gradients, value, by_scale = [np.zeros_like(images), np.zeros_like(texts)], 0.0, 0.0
    masked = alike(labels, labels)
    for i in range(len(images)):
        for j in range(len(images)):
            if i != j and masked[i, j]:
                continue
            sign, cosine = (1 if i == j else -1), images[i] @ texts[j]
            share = 0.5 * (weight[i] + weight[j]) / weight.sum()
            value += share * np.logaddexp(0, -sign * (SCALE * cosine + BIAS))
            slope = -share * sign / (1 + np.exp(sign * (SCALE * cosine + BIAS)))
            gradients[0][i] += SCALE * slope * texts[j]
            gradients[1][j] += SCALE * slope * images[i]
            by_scale += slope * cosine
    return value, (*gradients, by_scale)


def dense_softmax(images, texts, scale, labels, queue=None):
    return contrastive.info_nce(images, texts, scale, labels, queue)[0]


def tiled_softmax(images, texts, scale, labels, queue=None, exchange="gather"):
    return tiled.info_nce(images, texts, scale, labels, queue, tile=4, exchange=exchange)[0]


def dense_sigmoid(images, texts, scale, labels):
    return sigmoid.sigmoid(images, texts, scale, jnp.float32(BIAS), labels)


def tiled_sigmoid(images, texts, scale, labels, exchange="gather"):
    return tiled.sigmoid(images, texts, scale, jnp.float32(BIAS), labels, tile=4, exchange=exchange)


LOSSES = {
    "dense softmax": (dense_softmax, softmax_oracle),
    "tiled softmax": (tiled_softmax, softmax_oracle),
    "dense sigmoid": (dense_sigmoid, sigmoid_oracle),
    "tiled sigmoid": (tiled_sigmoid, sigmoid_oracle),
}
COMPILED = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))) for name, (loss, _) in LOSSES.items()}


def assert_equals(found, expected):
    assert float(found[0]) == pytest.approx(expected[0], rel=2e-5)
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert np.linalg.norm(gradient - exact) <= 2e-5 * np.linalg.norm(exact) + 1e-6


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_value_and_gradients_equal_the_oracle(name, seed):
    sides, labels = unit_vectors(SIZE, seed), random_labels(SIZE, seed)
    assert_equals(COMPILED[name](*sides, jnp.float32(SCALE), labels), LOSSES[name][1](*sides, labels))


@pytest.mark.parametrize("name", ["dense softmax", "tiled softmax"])
def test_the_queues_pairs_of_a_rows_query_are_not_its_negatives(name):
    sides, labels, queue = unit_vectors(SIZE), random_labels(SIZE), random_queue()
    assert (alike(labels._replace(group=-1 - labels.group), queue) & (queue.group >= 0)).any()
    expected = softmax_oracle(*sides, labels, queue)
    assert_equals(COMPILED[name](*sides, jnp.float32(SCALE), labels, queue), expected)


@pytest.mark.parametrize("name", ["tiled softmax", "tiled sigmoid"])
@pytest.mark.parametrize(("exchange_name", "block"), [("gather", 16), ("ring", exchange.BLOCK)])
def test_value_and_gradients_equal_the_oracle_on_eight_devices(name, exchange_name, block):
    loss, oracle = LOSSES[name]
    sides, labels = unit_vectors(37), random_labels(37)
    run = jax.jit(jax.value_and_grad(partial(loss, exchange=exchange_name), argnums=(0, 1, 2)))
    with jax.set_mesh(make_mesh(2, 4, 1, jax.devices("cpu"))), patch.object(exchange, "BLOCK", block):
        assert_equals(run(*sides, jnp.float32(SCALE), labels), oracle(*sides, labels))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 4, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_value_and_gradients_equal_the_oracle_on_any_mesh(name, sizes):
    loss, oracle = LOSSES[name]
    sides, labels = unit_vectors(40), random_labels(40)
    queue = (random_queue(),) if "softmax" in name else ()
    with jax.set_mesh(make_mesh(*sizes, jax.devices("cpu")[: int(np.prod(sizes))])):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        assert_equals(run(*sides, jnp.float32(SCALE), labels, *queue), oracle(*sides, labels, *queue))


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_change_nothing(name):
    sides, (group, _, _) = unit_vectors(SIZE), random_labels(SIZE)
    plain, weighted = (
        COMPILED[name](*sides, jnp.float32(SCALE), labels)
        for labels in (Labels(group), Labels(group, np.full(SIZE, -1, np.int32), np.ones(SIZE, np.float32)))
    )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(weighted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_weighted_mean_of_the_losses_of_its_pairs(name):
    sides, (group, query, weight) = unit_vectors(SIZE), random_labels(SIZE)

    def value(weight):
        return float(COMPILED[name](*sides, jnp.float32(SCALE), Labels(group, query, np.float32(weight)))[0])

    of_pairs = np.asarray([value(row) for row in np.eye(SIZE)])  # a pair alone has weight 1, all others 0
    assert value(weight) == pytest.approx(weight @ of_pairs / weight.sum(), rel=1e-5)
    assert value(7 * weight) == pytest.approx(value(weight), rel=1e-6)
    assert abs(value(weight) / value(np.ones(SIZE)) - 1) > 0.01
    assert value(np.zeros(SIZE)) == 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_any_weight_has_no_gradient(name):
    labels = random_labels(SIZE)._replace(weight=np.zeros(SIZE, np.float32))
    for leaf in jax.tree.leaves(COMPILED[name](*unit_vectors(SIZE), jnp.float32(100.0), labels)):
        assert (np.asarray(leaf) == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_one_query_masks_like_one_group_and_captions_do_not(name):
    sides = unit_vectors(SIZE)
    query = np.full(SIZE, -1, np.int32)
    query[[2, 5, 9]] = 4
    group = np.where(query < 0, np.arange(SIZE), 100).astype(np.int32)
    by_query, by_group, without = (
        COMPILED[name](*sides, jnp.float32(SCALE), labels)
        for labels in (Labels(query=query), Labels(group), Labels(query=np.full(SIZE, -1, np.int32)))
    )
    for one, other in zip(jax.tree.leaves(by_query), jax.tree.leaves(by_group), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert float(by_query[0]) < float(without[0])


def test_queries_of_one_side_alone_are_an_error():
    with pytest.raises(ValueError, match="known of one side only"):
        is_alike(Labels(query=jnp.zeros(2, jnp.int32)), Labels())


@pytest.mark.parametrize("info_nce", [0.0, 0.5])
def test_weights_multiply_the_correct_pairs_of_incorrect_pairs(info_nce):
    images, texts = unit_vectors(SIZE)
    wrong, labels = unit_vectors(SIZE, 3)[1], random_labels(SIZE)
    incorrect = Incorrect(wrong, np.linspace(-0.5, 0.9, SIZE, dtype=np.float32), np.arange(SIZE) != 4)
    objective = Objective("incorrect_pairs", alpha=2.0, beta=0.7, info_nce=info_nce)
    value, _ = objective(images, texts, jnp.float32(SCALE), labels=labels, incorrect_texts=incorrect)
    correct, unlike = (1 + np.sum(images * texts, 1)) / 2, (1 - np.sum(images * wrong, 1)) / 2
    likeness = np.where(incorrect[2], (1 + incorrect[1]) / 2, 1)
    of_correct = np.average(-likeness * np.log(correct), weights=labels.weight)
    of_incorrect = np.mean(np.where(incorrect[2], -(1 - likeness) * np.log(unlike), 0))
    expected = 2.0 * of_correct + 0.7 * of_incorrect + info_nce * softmax_oracle(images, texts, labels)[0]
    assert float(value) == pytest.approx(expected, rel=1e-4)
