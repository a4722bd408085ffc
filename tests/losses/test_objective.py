"""The objective computes the loss that it names, with the dense or the tiled implementation by batch size."""

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


def loss_value(loss, **options):
    return float(loss(IMAGES, TEXTS, SCALE, logit_bias=BIAS, incorrect_texts=INCORRECT, **options)[0])


def test_every_name_selects_its_loss():
    info_nce = float(contrastive.info_nce(IMAGES, TEXTS, SCALE)[0])
    pair_loss = float(incorrect_pairs(IMAGES, TEXTS, INCORRECT, alpha=2.0, beta=0.5, weighting="similarity")[0])
    expected = {
        "info_nce": info_nce,
        "sigmoid": float(sigmoid.sigmoid(IMAGES, TEXTS, SCALE, BIAS)),
        "incorrect_pairs": pair_loss,
    }
    assert expected.keys() == set(objective.NAMES)
    for name, value in expected.items():
        assert loss_value(Objective(name, alpha=2.0, beta=0.5)) == pytest.approx(value, rel=1e-6)
    combined = Objective("incorrect_pairs", alpha=2.0, beta=0.5, info_nce=0.25)
    assert loss_value(combined) == pytest.approx(pair_loss + 0.25 * info_nce, rel=1e-6)


def test_auto_selects_the_tiled_loss_only_for_large_batches(monkeypatch):
    def stub(*arguments, **options):
        return jnp.float32(-1.0), {}

    monkeypatch.setattr(objective.tiled, "info_nce", stub)
    assert loss_value(Objective()) > 0
    monkeypatch.setattr(objective, "DENSE_ROWS", 5)
    assert loss_value(Objective()) == -1


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="loss 'infonce' is not one of info_nce, sigmoid, incorrect_pairs"):
        loss_value(Objective("infonce"))
