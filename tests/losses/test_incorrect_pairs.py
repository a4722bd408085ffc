"""The loss over correct and incorrect pairs is Eqs. 1-5 of its paper, as DESIGN reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.losses.incorrect_pairs import incorrect_pairs
from jaxclip.losses.objective import Incorrect, Objective

ROWS = 9


def drawn(seed=0):
    random = np.random.default_rng(seed)
    sides = random.normal(size=(3, ROWS, 6))
    sides = (sides / np.linalg.norm(sides, axis=-1, keepdims=True)).astype(np.float32)
    return *sides, random.uniform(-1, 1, ROWS).astype(np.float32), random.random(ROWS) < 0.7


def slopes(weighting, similarity, **settings):
    images, texts, wrong, _, present = drawn()

    def loss(images, texts, wrong):
        return incorrect_pairs(images, texts, wrong, similarity, present, weighting=weighting, **settings)[0]

    return jax.grad(loss, argnums=(0, 1, 2))(images, texts, wrong)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.floats(0, 3), st.floats(0, 3), st.sampled_from(["similarity", "none"]))
def test_the_value_is_that_of_the_equations_written_out(seed, alpha, beta, weighting):
    images, texts, wrong, similarity, present = drawn(seed)
    value, _ = incorrect_pairs(images, texts, wrong, similarity, present, alpha=alpha, beta=beta, weighting=weighting)
    expected = 0.0
    for k in range(ROWS):
        correct, incorrect = (1 + np.float64(images[k]) @ texts[k]) / 2, (1 + np.float64(images[k]) @ wrong[k]) / 2
        alike = (1 + np.float64(similarity[k])) / 2
        weigh = weighting == "similarity" and present[k]
        expected += alpha * (alike if weigh else 1) * -np.log(correct) / ROWS
        if present[k]:
            expected += beta * ((1 - alike) if weigh else 1) * -np.log(1 - incorrect) / ROWS
    assert float(value) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_weights_change_the_gradients_but_inside_the_logarithm_they_are_inert():
    low, high = np.full(ROWS, -0.6, np.float32), np.full(ROWS, 0.6, np.float32)
    for one, other, without in zip(slopes("literal", low), slopes("literal", high), slopes("none", low), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
        np.testing.assert_allclose(one, without, rtol=1e-5)
    for one, other in zip(slopes("similarity", low), slopes("similarity", high), strict=True):
        assert np.abs(one - other).max() > 0.1 * np.abs(one).max()


def test_the_more_alike_the_pictures_the_more_the_correct_pair_counts_and_the_less_the_incorrect_one():
    low, high = np.full(ROWS, -0.6, np.float32), np.full(ROWS, 0.6, np.float32)
    (_, text_low, wrong_low), (_, text_high, wrong_high) = slopes("similarity", low), slopes("similarity", high)
    present = drawn()[4]
    np.testing.assert_allclose(text_high[present], 4 * text_low[present], rtol=1e-4)  # (1 + .6) / (1 - .6)
    np.testing.assert_allclose(4 * wrong_high[present], wrong_low[present], rtol=1e-4)


@pytest.mark.parametrize("weighting", ["similarity", "none", "literal"])
def test_a_row_that_was_left_out_has_no_incorrect_term_and_its_whole_correct_one(weighting):
    images, texts, wrong, similarity, present = drawn()
    similarity[~present] = np.nan
    text, incorrect = (slopes(weighting, similarity)[side] for side in (1, 2))
    assert (np.asarray(incorrect)[~present] == 0).all() and (np.asarray(incorrect)[present] != 0).any()
    np.testing.assert_allclose(text[~present], slopes("none", similarity)[1][~present], rtol=1e-5)


def test_perfectly_wrong_and_perfectly_right_pairs_have_finite_values_and_slopes():
    images = np.eye(4, dtype=np.float32)

    def loss(images, texts, wrong):
        return incorrect_pairs(images, texts, wrong, np.zeros(4, np.float32), np.ones(4, bool))[0]

    value, found = jax.value_and_grad(loss, argnums=(0, 1, 2))(images, -images, images)
    assert np.isfinite(value) and value > 5
    assert all(np.isfinite(slope).all() and np.abs(slope).max() > 1 for slope in found)


def test_info_nce_is_added_with_its_weight():
    images, texts, *wrong = drawn()
    run = dict(logit_scale=jnp.float32(10.0), incorrect_texts=Incorrect(*wrong))
    alone, _ = Objective("incorrect_pairs")(images, texts, **run)
    both, metrics = Objective("incorrect_pairs", info_nce=0.5)(images, texts, **run)
    contrast, _ = Objective("info_nce")(images, texts, jnp.float32(10.0))
    assert float(both) == pytest.approx(float(alone + 0.5 * contrast), rel=1e-6)
    assert {"correct_similarity", "incorrect_similarity", "info_nce", "image_to_text_accuracy"} <= metrics.keys()


@pytest.mark.parametrize("name", ["info_nce", "sigmoid"])
def test_an_objective_is_the_same_dense_and_tiled(name):
    images, texts, *_ = drawn()
    values = [
        Objective(name, implementation, tile=4)(
            images, texts, jnp.float32(10.0), logit_bias=jnp.float32(-3.0), groups=np.arange(ROWS) // 2
        )[0]
        for implementation in ("dense", "tiled", "auto")
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
