"""The objective computes the loss that its name says, in the implementation that the batch needs."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.losses import contrastive, objective, sigmoid
from jaxclip.losses.incorrect_pairs import incorrect_pairs
from jaxclip.losses.objective import Incorrect, Objective

SCALE, BIAS = jnp.float32(10.0), jnp.float32(-5.0)


def unit_vectors(seed, rows=6, dimension=8):
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension))
    return jnp.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), jnp.float32)


IMAGES, TEXTS = unit_vectors(0), unit_vectors(1)
INCORRECT = Incorrect(unit_vectors(2), jnp.linspace(0.1, 0.9, 6), jnp.arange(6) != 3)


def value_of(loss, **options):
    return float(loss(IMAGES, TEXTS, SCALE, logit_bias=BIAS, incorrect_texts=INCORRECT, **options)[0])


def test_each_name_is_its_loss():
    info_nce = float(contrastive.info_nce(IMAGES, TEXTS, SCALE)[0])
    pairs = float(incorrect_pairs(IMAGES, TEXTS, *INCORRECT, alpha=2.0, beta=0.5, weighting="similarity")[0])
    expected = {
        "info_nce": info_nce,
        "sigmoid": float(sigmoid.sigmoid(IMAGES, TEXTS, SCALE, BIAS)),
        "incorrect_pairs": pairs,
    }
    assert expected.keys() == set(objective.NAMES)
    for name, value in expected.items():
        assert value_of(Objective(name, alpha=2.0, beta=0.5)) == pytest.approx(value, rel=1e-6)
    added = Objective("incorrect_pairs", alpha=2.0, beta=0.5, info_nce=0.25)
    assert value_of(added) == pytest.approx(pairs + 0.25 * info_nce, rel=1e-6)


def test_auto_is_tiled_for_large_batches_only(monkeypatch):
    def tiled(*arguments, **options):
        return jnp.float32(-1.0), {}

    monkeypatch.setattr(objective.tiled, "info_nce", tiled)
    assert value_of(Objective()) > 0
    monkeypatch.setattr(objective, "DENSE_ROWS", 5)
    assert value_of(Objective()) == -1


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="loss 'infonce' is none of info_nce, sigmoid, incorrect_pairs"):
        value_of(Objective("infonce"))
