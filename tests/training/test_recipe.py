"""The shapes of the batch and the parameters are known and checked before anything is compiled."""

from types import SimpleNamespace

import jax
import pytest

from jaxclip import config
from jaxclip.errors import UserError
from jaxclip.losses.objective import Objective
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.towers.towers import make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_objective, make_recipe
from jaxclip.training.run import begin_or_resume
from jaxclip.training.state import initial_state

SMALL = {"steps": 1, "model": {"preset": "tiny"}, "data": {"image_size": 32, "context_length": 8, "vocab_size": 258}}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red shirt"], 258)


def configured_towers(configuration, tokenizer):
    return make_towers(configuration, make_preprocess(configuration), tokenizer)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"batch_size": 4}, "config.batch_size = 4 is smaller than the number of devices that share a batch, mesh"),
        ({"batch_size": 12}, "config.batch_size = 12 is not a multiple of mesh data x fsdp = 8"),
        ({"batch_size": 16, "loss": {"microbatch": 4}}, "config.loss.microbatch = 4 is not a multiple of mesh data x"),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused(tokenizer, changed, problem):
    assert jax.device_count() == 8
    configuration = config.build({**SMALL, **changed})
    with pytest.raises(UserError, match=problem):
        abstract_batch(configuration, configured_towers(configuration, tokenizer))


@pytest.mark.parametrize("name", ["info_nce", "sigmoid", "incorrect_pairs"])
def test_each_loss_gets_the_batch_and_the_parameters_it_reads(tokenizer, name):
    configuration = config.build({**SMALL, "loss": {"name": name, "tile": 64, "implementation": "tiled"}})
    towers = configured_towers(configuration, tokenizer)
    batch = abstract_batch(configuration, towers)
    extra = {"incorrect_text", "similarity", "has_incorrect"} if name == "incorrect_pairs" else set()
    assert batch.keys() == {"image", "text", "group"} | extra
    assert ("logit_bias" in towers.shapes) == (name == "sigmoid")
    assert make_objective(configuration) == Objective(name, "tiled", 64)


def test_a_run_on_judged_queries_has_batches_and_a_queue_with_queries(tokenizer):
    judged = {"augmentation": {"queries": 0.5}, "data": {**SMALL["data"], "queries": "judged.csv"}}
    for settings, expected in (({}, False), (judged, True)):
        configuration = config.build({**SMALL, "loss": {"queue": 16}, **settings})
        towers = configured_towers(configuration, tokenizer)
        batch = abstract_batch(configuration, towers)
        assert ({"query", "weight"} <= batch.keys()) == expected
        assert ({"query", "weight"} & batch.keys() != set()) == expected
        queue = make_recipe(configuration, towers, 1).state.optimizer.queue
        assert (queue.query is not None) == expected
        if expected:
            assert batch["weight"].dtype == "float32" and batch["query"].dtype == queue.query.dtype == "int32"


@pytest.mark.parametrize(
    ("saved", "now", "problem"),
    [
        ({"data_fingerprint": "a"}, {"data_fingerprint": "b"}, "data_fingerprint a, now b.: restore the catalogue or"),
        (
            {"data_fingerprint": "a", "queries_fingerprint": "q"},
            {"data_fingerprint": "a", "queries_fingerprint": "r"},
            "queries_fingerprint q, now r.: restore the file data.queries or use another --workdir",
        ),
        ({"data_fingerprint": "a"}, {"data_fingerprint": "a"}, ""),
    ],
)
def test_a_run_resumes_only_on_the_data_and_the_queries_that_it_was_trained_on(saved, now, problem):
    state = SimpleNamespace(step=3)
    checkpoints = SimpleNamespace(folder="W/checkpoints", restore_latest=lambda *_: (state, saved))
    arguments = SimpleNamespace(state=None), checkpoints, now, lambda: (None, {}), lambda line: None
    if not problem:
        assert begin_or_resume(*arguments) == (state, {**saved, **now}, True)
        return
    with pytest.raises(UserError, match=f"W/checkpoints was trained on other data .{problem}"):
        begin_or_resume(*arguments)


def test_the_logit_bias_starts_at_the_configured_value(tokenizer):
    configuration = config.build({**SMALL, "loss": {"name": "sigmoid", "bias": -4.0}})
    towers = configured_towers(configuration, tokenizer)
    recipe = make_recipe(configuration, towers, 1)
    state = initial_state(towers.config, recipe.optimizer, recipe.state, seed=0)
    assert float(state.params["logit_bias"]) == -4.0


def test_model_patch_changes_the_number_of_patches_of_a_preset(tokenizer):
    configuration = config.build({**SMALL, "model": {"preset": "tiny", "patch": 8}})
    towers = configured_towers(configuration, tokenizer)
    assert towers.config.image.patch == 8 and towers.shapes["image"]["positions"].shape == (16, 128)
    assert configured_towers(config.build(SMALL), tokenizer).shapes["image"]["positions"].shape == (4, 128)
