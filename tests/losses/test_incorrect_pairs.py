"""The loss over correct and incorrect pairs equals Eqs. 1-5 of its paper, with the weight outside the logarithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses.incorrect_pairs import incorrect_pairs
from jaxclip.losses.labels import Labels
from jaxclip.losses.objective import Incorrect, Objective

ROWS = 9


def random_batch(seed=0):
    """Returns images, texts and incorrect texts (ROWS, 6), similarities (ROWS,), and which incorrect texts exist."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(3, ROWS, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return *vectors, random.uniform(-1, 1, ROWS).astype(np.float32), random.random(ROWS) < 0.7


def gradients(weighting, similarity, **settings):
    """Returns the gradients by images, texts and incorrect texts."""
    images, texts, wrong, _, present = random_batch()

    def loss(images, texts, wrong):
        return incorrect_pairs(images, texts, Incorrect(wrong, similarity, present), weighting=weighting, **settings)[0]

    return jax.grad(loss, argnums=(0, 1, 2))(images, texts, wrong)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0, 3), st.floats(0, 3), st.sampled_from(["similarity", "none"]))
def test_the_value_equals_the_equations_row_by_row(seed, alpha, beta, weighting):
    images, texts, wrong, similarity, present = random_batch(seed)
    incorrect = Incorrect(wrong, similarity, present)
    value, _ = incorrect_pairs(images, texts, incorrect, alpha=alpha, beta=beta, weighting=weighting)
    expected = 0.0
    for k in range(ROWS):
        correct, incorrect = (1 + np.float64(images[k]) @ texts[k]) / 2, (1 + np.float64(images[k]) @ wrong[k]) / 2
        weight = (1 + np.float64(similarity[k])) / 2
        weighted = weighting == "similarity" and present[k]
        expected += alpha * (weight if weighted else 1) * -np.log(correct) / ROWS
        if present[k]:
            expected += beta * ((1 - weight) if weighted else 1) * -np.log(1 - incorrect) / ROWS
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_weights_affect_the_gradients_only_outside_the_logarithm():
    low, high = np.full(ROWS, -0.6, np.float32), np.full(ROWS, 0.6, np.float32)
    unweighted = gradients("none", low)
    for at_low, at_high, without in zip(gradients("literal", low), gradients("literal", high), unweighted, strict=True):
        np.testing.assert_allclose(at_low, at_high, rtol=1e-5)
        np.testing.assert_allclose(at_low, without, rtol=1e-5)
    for at_low, at_high in zip(gradients("similarity", low), gradients("similarity", high), strict=True):
        assert np.abs(at_low - at_high).max() > 0.1 * np.abs(at_low).max()


def test_similar_pictures_raise_the_correct_pairs_weight_and_lower_the_incorrect_pairs():
    low, high = np.full(ROWS, -0.6, np.float32), np.full(ROWS, 0.6, np.float32)
    (_, text_low, wrong_low), (_, text_high, wrong_high) = gradients("similarity", low), gradients("similarity", high)
    present = random_batch()[4]
    np.testing.assert_allclose(text_high[present], 4 * text_low[present], rtol=1e-4)  # (1 + .6) / (1 - .6)
    np.testing.assert_allclose(4 * wrong_high[present], wrong_low[present], rtol=1e-4)


@pytest.mark.parametrize("weighting", ["similarity", "none", "literal"])
def test_a_row_without_an_incorrect_text_has_only_the_unweighted_correct_term(weighting):
    images, texts, wrong, similarity, present = random_batch()
    similarity[~present] = np.nan
    _, text, incorrect = gradients(weighting, similarity)
    assert (np.asarray(incorrect)[~present] == 0).all() and (np.asarray(incorrect)[present] != 0).any()
    np.testing.assert_allclose(text[~present], gradients("none", similarity)[1][~present], rtol=1e-5)


def test_pairs_of_cosine_one_and_minus_one_have_finite_values_and_gradients():
    images = np.eye(4, dtype=np.float32)

    def loss(images, texts, wrong):
        return incorrect_pairs(images, texts, Incorrect(wrong, np.zeros(4, np.float32), np.ones(4, bool)))[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(images, -images, images)
    assert np.isfinite(value) and value > 5
    assert all(np.isfinite(gradient).all() and np.abs(gradient).max() > 1 for gradient in gradients)


def test_info_nce_is_added_with_its_weight():
    images, texts, *incorrect = random_batch()
    arguments = dict(logit_scale=jnp.float32(10.0), incorrect_texts=Incorrect(*incorrect))
    alone, _ = Objective("incorrect_pairs")(images, texts, **arguments)
    combined, metrics = Objective("incorrect_pairs", info_nce=0.5)(images, texts, **arguments)
    info_nce, _ = Objective("info_nce")(images, texts, jnp.float32(10.0))
    assert float(combined) == pytest.approx(float(alone + 0.5 * info_nce), rel=1e-6)
    assert {"correct_similarity", "incorrect_similarity", "info_nce", "image_to_text_accuracy"} <= metrics.keys()


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
def test_dense_and_tiled_objectives_have_equal_values(name):
    images, texts, *_ = random_batch()
    values = [
        Objective(name, implementation, tile=4)(
            images, texts, jnp.float32(10.0), logit_bias=jnp.float32(-3.0), labels=Labels(np.arange(ROWS) // 2)
        )[0]
        for implementation in ("dense", "tiled", "auto")
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
