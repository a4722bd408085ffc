"""InfoNCE equals an oracle in float64, in value and gradient, with and without groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses.contrastive import info_nce

loss_of = jax.jit(info_nce)
gradients_of = jax.jit(jax.value_and_grad(lambda *args: info_nce(*args)[0], argnums=(0, 1, 2)))


def oracle(images, texts, scale, groups):
    """Loss and gradients in float64, row by row, each row's list of candidates written out."""
    images, texts, scale = np.float64(images), np.float64(texts), float(scale)
    cosines = images @ texts.T
    slopes, loss, size = np.zeros_like(cosines), 0.0, len(images)
    for row in range(size):
        candidates = [other for other in range(size) if other == row or groups[other] != groups[row]]
        for logits, at in ((scale * cosines[row], lambda c, row=row: (row, c)), (scale * cosines[:, row], None)):
            chosen = logits[candidates]
            top = chosen.max()
            weights = np.exp(chosen - top)
            loss += (top + np.log(weights.sum()) - logits[row]) / (2 * size)
            for candidate, share in zip(candidates, weights / weights.sum(), strict=True):
                place = at(candidate) if at else (candidate, row)
                slopes[place] += (share - (candidate == row)) / (2 * size)
    return loss, (scale * slopes @ texts, scale * slopes.T @ images, (slopes * cosines).sum())


def vectors(size, dimension=8, seed=0):
    random = np.random.default_rng(seed)
    drawn = random.normal(size=(2, size, dimension))
    return (drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)).astype(np.float32)


def assert_equals_oracle(images, texts, scale, groups):
    value, found = gradients_of(images, texts, np.float32(scale), None if groups is None else np.asarray(groups))
    distinct = np.arange(len(images)) if groups is None else groups
    expected, gradients = oracle(images, texts, np.float32(scale), distinct)
    # float32 carries seven digits of the largest logit, which is the scale.
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * max(1, scale / 4))
    for ours, right in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=3e-6 * max(1, scale))


def test_the_oracles_gradients_are_its_slopes():
    images, texts = np.float64(vectors(4))
    groups = [0, 1, 1, 2]
    loss, gradients = oracle(images, texts, 5.0, groups)
    for side, gradient in ((0, gradients[0]), (1, gradients[1])):
        moved = [images.copy(), texts.copy()]
        moved[side][2, 3] += 1e-6
        assert (oracle(*moved, 5.0, groups)[0] - loss) / 1e-6 == pytest.approx(gradient[2, 3], abs=1e-6)
    assert (oracle(images, texts, 5.0 + 1e-6, groups)[0] - loss) / 1e-6 == pytest.approx(gradients[2], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 5, 12]), st.sampled_from([0.5, 14.3, 100.0]), st.integers(0, 2**32 - 1))
def test_the_loss_and_its_gradients_equal_the_oracle(size, scale, seed):
    assert_equals_oracle(*vectors(size, seed=seed), scale, None)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 5, 12]), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_of_one_group_are_not_each_others_negatives(size, kinds, seed):
    groups = np.random.default_rng(seed).integers(0, kinds, size)
    assert_equals_oracle(*vectors(size, seed=seed), 10.0, groups)


def test_a_duplicate_costs_nothing_when_its_group_says_so():
    distinct = np.eye(11, dtype=np.float32)
    images = np.concatenate([distinct, distinct[:1]])
    scale, groups = jnp.float32(100.0), np.asarray([*range(11), 0])
    assert float(loss_of(images, images, scale)[0]) == pytest.approx(2 * np.log(2) / 12, rel=1e-4)
    assert float(loss_of(images, images, scale, groups)[0]) < 1e-6


def test_one_group_of_everything_leaves_nothing_to_learn():
    value, slopes = gradients_of(*vectors(12), jnp.float32(10.0), np.zeros(12, int))
    assert value == 0 and all((np.asarray(slope) == 0).all() for slope in slopes)


def test_perfect_embeddings_cost_nothing_at_a_high_scale():
    images = np.eye(8, dtype=np.float32)
    value, metrics = loss_of(images, images, jnp.float32(100.0))
    assert float(value) < 1e-6
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1.0
    assert float(loss_of(images, np.roll(images, 1, axis=0), jnp.float32(100.0))[0]) > 99


def test_random_embeddings_cost_the_logarithm_of_the_batch():
    assert float(loss_of(*vectors(12), jnp.float32(0.0))[0]) == pytest.approx(np.log(12), rel=1e-6)


def test_a_pair_alone_costs_nothing_and_has_no_gradient():
    value, slopes = gradients_of(*vectors(1), jnp.float32(14.0), np.asarray([3]))
    assert value == 0 and all((np.asarray(slope) == 0).all() for slope in slopes)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_the_pairs_does_not_matter(order):
    images, texts = vectors(12)
    groups = np.arange(12) // 2
    value, (slopes, _, _) = gradients_of(images, texts, jnp.float32(10.0), groups)
    moved, (moved_slopes, _, _) = gradients_of(images[order], texts[order], jnp.float32(10.0), groups[order])
    assert float(moved) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(moved_slopes, np.asarray(slopes)[order], atol=1e-6)


def test_each_direction_counts_its_own_right_answers():
    images = np.asarray([[1, 0], [1, 0]], np.float32)
    texts = np.asarray([[1, 0], [0, 1]], np.float32)
    _, metrics = loss_of(images, texts, jnp.float32(1.0))
    assert metrics["image_to_text_accuracy"] == 0.5  # both pictures are nearest the first text
    assert metrics["text_to_image_accuracy"] == 1.0  # its ties count as right


def test_the_loss_is_computed_in_float32_from_bfloat16_embeddings():
    images, texts = (jnp.asarray(side, jnp.bfloat16) for side in vectors(12))
    value, _ = loss_of(images, texts, jnp.float32(100.0))
    expected, _ = oracle(np.asarray(images, np.float32), np.asarray(texts, np.float32), 100.0, np.arange(12))
    assert value.dtype == jnp.float32 and float(value) == pytest.approx(expected, rel=1e-5)
