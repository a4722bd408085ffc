"""InfoNCE and its gradients equal a float64 oracle, with and without groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses.contrastive import info_nce
from jaxclip.losses.labels import Labels

compiled_loss = jax.jit(info_nce)
compiled_gradients = jax.jit(jax.value_and_grad(lambda *args: info_nce(*args)[0], argnums=(0, 1, 2)))


def oracle(images, texts, scale, groups):
    """Returns the float64 loss and its gradients by images, texts and scale.

    Each row's softmax is computed separately, over an explicit list of its candidates.
    """
    images, texts, scale = np.float64(images), np.float64(texts), float(scale)
    cosines = images @ texts.T
    slopes, loss, size = np.zeros_like(cosines), 0.0, len(images)  # slopes: of the loss by each logit
    for row in range(size):
        candidates = [other for other in range(size) if other == row or groups[other] != groups[row]]
        # Image to text along a row of the matrix, text to image along a column.
        for logits, slopes_of_row in ((scale * cosines[row], slopes[row]), (scale * cosines[:, row], slopes[:, row])):
            selected = logits[candidates]
            largest = selected.max()
            weights = np.exp(selected - largest)
            loss += (largest + np.log(weights.sum()) - logits[row]) / (2 * size)
            for candidate, probability in zip(candidates, weights / weights.sum(), strict=True):
                slopes_of_row[candidate] += (probability - (candidate == row)) / (2 * size)
    return loss, (scale * slopes @ texts, scale * slopes.T @ images, (slopes * cosines).sum())


def random_unit_vectors(size, dimension=8, seed=0):
    """Returns (2, size, dimension) float32, images and texts."""
    vectors = np.random.default_rng(seed).normal(size=(2, size, dimension))
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def assert_equals_oracle(images, texts, scale, groups):
    labels = Labels() if groups is None else Labels(np.asarray(groups))
    value, gradients = compiled_gradients(images, texts, np.float32(scale), labels)
    oracle_groups = np.arange(len(images)) if groups is None else groups
    expected, expected_gradients = oracle(images, texts, np.float32(scale), oracle_groups)
    # float32 has seven significant digits, and no logit exceeds the scale.
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * max(1, scale / 4))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=3e-6 * max(1, scale))


def test_the_oracles_gradients_equal_finite_differences():
    images, texts = np.float64(random_unit_vectors(4))
    groups = [0, 1, 1, 2]
    loss, gradients = oracle(images, texts, 5.0, groups)
    for side, gradient in ((0, gradients[0]), (1, gradients[1])):
        shifted = [images.copy(), texts.copy()]
        shifted[side][2, 3] += 1e-6
        assert (oracle(*shifted, 5.0, groups)[0] - loss) / 1e-6 == pytest.approx(gradient[2, 3], abs=1e-6)
    assert (oracle(images, texts, 5.0 + 1e-6, groups)[0] - loss) / 1e-6 == pytest.approx(gradients[2], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 5, 12]), st.sampled_from([0.5, 14.3, 100.0]), st.integers(0, 2**32 - 1))
def test_the_loss_and_its_gradients_equal_the_oracle(size, scale, seed):
    assert_equals_oracle(*random_unit_vectors(size, seed=seed), scale, None)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 5, 12]), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_rows_of_one_group_are_not_each_others_negatives(size, group_count, seed):
    groups = np.random.default_rng(seed).integers(0, group_count, size)
    assert_equals_oracle(*random_unit_vectors(size, seed=seed), 10.0, groups)


def test_a_duplicate_in_the_same_group_adds_no_loss():
    distinct = np.eye(11, dtype=np.float32)
    images = np.concatenate([distinct, distinct[:1]])
    scale, groups = jnp.float32(100.0), np.asarray([*range(11), 0])
    assert float(compiled_loss(images, images, scale)[0]) == pytest.approx(2 * np.log(2) / 12, rel=1e-4)
    assert float(compiled_loss(images, images, scale, Labels(groups))[0]) < 1e-6


def test_a_batch_of_one_group_has_zero_loss_and_gradients():
    value, gradients = compiled_gradients(*random_unit_vectors(12), jnp.float32(10.0), Labels(np.zeros(12, int)))
    assert value == 0 and all((np.asarray(gradient) == 0).all() for gradient in gradients)


def test_perfect_embeddings_have_zero_loss_at_a_high_scale():
    images = np.eye(8, dtype=np.float32)
    value, metrics = compiled_loss(images, images, jnp.float32(100.0))
    assert float(value) < 1e-6
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1.0
    assert float(compiled_loss(images, np.roll(images, 1, axis=0), jnp.float32(100.0))[0]) > 99


def test_at_scale_zero_the_loss_is_the_logarithm_of_the_batch_size():
    assert float(compiled_loss(*random_unit_vectors(12), jnp.float32(0.0))[0]) == pytest.approx(np.log(12), rel=1e-6)


def test_a_single_pair_has_zero_loss_and_gradients():
    value, gradients = compiled_gradients(*random_unit_vectors(1), jnp.float32(14.0), Labels(np.asarray([3])))
    assert value == 0 and all((np.asarray(gradient) == 0).all() for gradient in gradients)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_the_pairs_does_not_matter(order):
    images, texts = random_unit_vectors(12)
    groups = np.arange(12) // 2
    value, (gradient, _, _) = compiled_gradients(images, texts, jnp.float32(10.0), Labels(groups))
    permuted = images[order], texts[order], jnp.float32(10.0), Labels(groups[order])
    permuted_value, (permuted_gradient, _, _) = compiled_gradients(*permuted)
    assert float(permuted_value) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(permuted_gradient, np.asarray(gradient)[order], atol=1e-6)


def test_each_direction_has_its_own_accuracy():
    images = np.asarray([[1, 0], [1, 0]], np.float32)
    texts = np.asarray([[1, 0], [0, 1]], np.float32)
    _, metrics = compiled_loss(images, texts, jnp.float32(1.0))
    assert metrics["image_to_text_accuracy"] == 0.5  # both pictures are nearest to the first text
    assert metrics["text_to_image_accuracy"] == 1.0  # ties count as correct


def test_the_loss_is_computed_in_float32_from_bfloat16_embeddings():
    images, texts = (jnp.asarray(side, jnp.bfloat16) for side in random_unit_vectors(12))
    value, _ = compiled_loss(images, texts, jnp.float32(100.0))
    expected, _ = oracle(np.asarray(images, np.float32), np.asarray(texts, np.float32), 100.0, np.arange(12))
    assert value.dtype == jnp.float32 and float(value) == pytest.approx(expected, rel=1e-5)
