"""Microbatches give the loss and gradients of the undivided batch, random draws included, in less memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.losses.objective import Objective
from jaxclip.models.clip import CLIP
from jaxclip.models.presets import Preset, clip_config, with_execution
from jaxclip.runtime import mesh
from jaxclip.towers.params import make_model
from jaxclip.training.step import make_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, CONTEXT, END = 32, 8, 63
SHAPE = with_execution(
    clip_config(
        Preset(8, (32, 2, 2), (32, 2, 2), 32, "conv", "mean", "mean", "gelu_tanh"),
        image_size=32,
        vocab_size=64,
        context_length=CONTEXT,
        end_token=END,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    ),
    dropout=0.2,
    stochastic_depth=0.4,
    patch_dropout=0.5,
    execution="scan",
)
CONFIG = replace(SHAPE, logit_bias=-10.0)
GRAPH, _ = make_model(CONFIG)
PARAMS = nnx.to_pure_dict(nnx.state(CLIP(CONFIG, rngs=nnx.Rngs(0))))
INFO_NCE, TILED = Objective(implementation="dense"), Objective(implementation="tiled", tile=8)
SIGMOID = Objective("sigmoid", "tiled", tile=8)
INCORRECT = Objective("incorrect_pairs", info_nce=1.0)


def batch_for(objective, rows=BATCH):
    """Returns a random batch with the arrays that the objective reads."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, END, (2, rows, CONTEXT), dtype=np.int32)
    tokens[..., -1] = END
    batch = {"image": random.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8), "text": tokens[0]}
    batch["group"] = random.integers(0, rows // 2, rows, dtype=np.int32)
    if objective is INCORRECT:
        similarity = random.uniform(-1, 1, rows).astype(np.float32)
        batch |= {"incorrect_text": tokens[1], "similarity": similarity, "has_incorrect": similarity < 0.8}
    return batch


def compile_loss(objective, microbatch, batch, key):
    """Returns the compiled function (params, batch, key) -> ((loss, metrics), gradients)."""
    loss = make_loss(GRAPH, mask_groups=True, learned_temperature=True, objective=objective, microbatch=microbatch)
    return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(PARAMS, batch, key).compile()


def run(objective, microbatch, key=7):
    """Returns the loss, the metrics and the gradients of a batch."""
    batch, key = batch_for(objective), jax.random.key(key)
    (value, metrics), gradients = compile_loss(objective, microbatch, batch, key)(PARAMS, batch, key)
    return float(value), jax.device_get(metrics), jax.device_get(gradients)


def assert_close(actual, expected):
    assert actual[0] == pytest.approx(expected[0], rel=1e-5)
    assert actual[1].keys() == expected[1].keys()
    for leaf, reference in zip(jax.tree.leaves(actual[1:]), jax.tree.leaves(expected[1:]), strict=True):
        assert np.linalg.norm(leaf - reference) <= 2e-5 * np.linalg.norm(reference) + 1e-7


@pytest.mark.parametrize("microbatch", [0, 8])
def test_the_objective_gets_the_queries_and_weights_of_its_rows_in_order(microbatch):
    def objective(image, text, scale, *, labels, **_):
        return jnp.sum(labels.weight * labels.query * labels.group), {}

    batch = batch_for(INFO_NCE)
    batch |= {"query": np.arange(BATCH, dtype=np.int32) - 5, "weight": np.linspace(0, 2, BATCH, dtype=np.float32)}
    loss = make_loss(GRAPH, mask_groups=True, learned_temperature=True, objective=objective, microbatch=microbatch)
    value, _ = jax.jit(loss)(PARAMS, batch, None)
    assert float(value) == pytest.approx(np.sum(batch["weight"] * batch["query"] * batch["group"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [INFO_NCE, TILED, SIGMOID, INCORRECT], ids=lambda o: f"{o.name} {o.implementation}"
)
def test_weighted_microbatches_have_the_loss_and_the_gradients_of_the_whole_batch(objective):
    random = np.random.default_rng(1)
    query = random.integers(-1, 9, BATCH, dtype=np.int32)
    batch = batch_for(objective) | {"query": query, "weight": random.uniform(0, 2, BATCH).astype(np.float32)}
    key = jax.random.key(7)
    (whole, _), gradients = compile_loss(objective, 0, batch, key)(PARAMS, batch, key)
    (value, _), by_parts = compile_loss(objective, 8, batch, key)(PARAMS, batch, key)
    plain = batch_for(objective)
    (unweighted, _), _ = compile_loss(objective, 0, plain, key)(PARAMS, plain, key)
    assert float(value) == pytest.approx(float(whole), rel=1e-5) and float(unweighted) != pytest.approx(
        float(whole), rel=1e-5
    )
    for leaf, reference in zip(jax.tree.leaves(by_parts), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(leaf - reference) <= 2e-5 * np.linalg.norm(reference) + 1e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective", [INFO_NCE, TILED, SIGMOID, INCORRECT], ids=lambda o: f"{o.name} {o.implementation}"
)
def test_a_batch_in_microbatches_has_the_loss_and_the_gradients_of_the_whole_batch(objective):
    whole = run(objective, 0)
    assert_close(run(objective, 8), whole)
    assert abs(run(objective, 8, key=8)[0] - whole[0]) > 1e-4  # another key gives another loss, so dropout is on


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [0, 8])
def test_microbatches_on_a_mesh_have_the_loss_and_gradients_of_the_whole_batch(microbatch):
    whole = run(INFO_NCE, 0)
    with jax.set_mesh(mesh.make_mesh(2, 2, 2, jax.devices("cpu"))):
        assert_close(run(TILED, microbatch), whole)


def test_memory_shrinks_with_the_microbatch():
    def temporaries(microbatch):
        batch, key = batch_for(INFO_NCE, 512), jax.random.key(0)
        return compile_loss(INFO_NCE, microbatch, batch, key).memory_analysis().temp_size_in_bytes

    assert temporaries(32) < temporaries(0) / 6


def test_a_microbatch_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="microbatches of 9 rows do not divide a batch of 32"):
        run(INFO_NCE, 9)
