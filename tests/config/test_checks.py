"""A value that is not allowed, and values that contradict each other, are refused with a sentence that names them."""

import re

import pytest

from jaxclip import config
from jaxclip.config.declare import keys
from jaxclip.config.schema import Config
from jaxclip.errors import UserError

RUN = {"steps": 1}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "set exactly one of steps and epochs: neither is"),
        ({"steps": 1, "epochs": 1.0}, "set exactly one of steps and epochs: both are set"),
        ({**RUN, "data": {"reader": "table"}}, "data.reader = 'table' needs data.path"),
        (
            {**RUN, "data": {"columns": {"id": "sku"}}},
            "data.columns is for data.reader = 'table', 'tfds' or 'webdataset', not 'drawn'",
        ),
        (
            {**RUN, "data": {"path": "shop"}},
            "data.path = 'shop' is not read by data.reader = 'drawn', .* set data.reader to .*folder.*table",
        ),
        ({**RUN, "data": {"test": 0.0}}, "data.test = 0.0 must be greater than 0"),
        ({**RUN, "data": {"image_size": 72}}, "data.image_size = 72 is no multiple of the patch .* nearest is 64"),
        (
            {**RUN, "model": {"patch": 128}},
            "data.image_size = 64 is no multiple of model.patch, 128; the nearest is 128",
        ),
        (
            {**RUN, "model": {"patch": 10}, "data": {"image_size": 60}},
            "model.patch = 10 must be a power of two: the stem of",
        ),
        ({**RUN, "model": {"init_from": "W", "patch": 8}}, "model.patch comes from model.init_from: leave it out"),
        ({**RUN, "data": {"resize_on": "gpu"}}, "data.resize_on = 'gpu' is none of auto, host, device"),
        ({**RUN, "data": {"caption_template": "{season}"}}, "data.caption_template: .* lacks {name}"),
        ({**RUN, "augmentation": {"crop_area": (0.9, 0.5)}}, r"augmentation.crop_area = \(0.9, 0.5\) must be an"),
        ({**RUN, "augmentation": {"crop_area": (0.5, 1.5)}}, "augmentation.crop_area"),
        ({**RUN, "augmentation": {"crop_aspect": (0.0, 1.0)}}, "augmentation.crop_aspect"),
        ({**RUN, "mesh": {"data": -1, "fsdp": -1}}, "mesh = .* at most one is -1"),
        ({**RUN, "mesh": {"tensor": 0}}, "mesh = .* each is >= 1"),
        ({**RUN, "seed": 2**31}, r"seed = 2147483648 must be in \[-2147483648, 2147483647\]"),
        ({**RUN, "batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({**RUN, "model": {"dropout": 1.5}}, "model.dropout = 1.5 must be in"),
        ({**RUN, "model": {"dropout": 1.0}}, "model.dropout = 1.0 must be in"),
        ({**RUN, "model": {"stochastic_depth": 1.0}}, "model.stochastic_depth = 1.0 must be in"),
        ({**RUN, "optimizer": {"beta2": 1.0}}, "optimizer.beta2 = 1.0 must be in"),
        ({**RUN, "data": {"std": (0.25, 0.0, 0.25)}}, "data.std"),
        ({**RUN, "optimizer": {"epsilon": 0.0}}, "optimizer.epsilon"),
        ({**RUN, "optimizer": {"layer_decay": 0.0}}, r"optimizer.layer_decay = 0.0 must be in \(0, 1\]"),
        ({**RUN, "evaluation": {"zooms": (0.5, 1.0)}}, r"evaluation.zooms = \(0.5, 1.0\): each must be at least 1"),
        ({**RUN, "optimizer": {"ema": 1.0}}, "optimizer.ema = 1.0 must be in"),
        ({**RUN, "optimizer": {"rates": {"x": -1.0}}}, "optimizer.rates = .* no factor may be negative"),
        (
            {**RUN, "optimizer": {"name": "adam", "weight_decay": 0.1}},
            "optimizer.weight_decay is for optimizer.name = 'adamw' or 'muon', not 'adam'",
        ),
        ({**RUN, "task": "adapter"}, "task = 'adapter' needs model.init_from"),
        ({**RUN, "lora": {"rank": 4}}, "lora is for task = 'adapter', not 'towers'"),
        ({**RUN, "task": "adapter", "model": {"init_from": "W"}, "lora": {"alpha": 0.0}}, "lora.alpha = 0.0 must be"),
        ({**RUN, "task": "adapter", "model": {"init_from": "W"}, "lora": {"rank": 0}}, "lora.rank = 0 must be"),
        ({**RUN, "model": {"preset": "vit_b_16"}, "loss": {"name": "siglip"}}, "loss.name = 'siglip' is none of"),
        ({**RUN, "loss": {"implementation": "tilde"}}, ".* dense, tiled; did you mean tiled?"),
        ({**RUN, "loss": {"microbatch": 100}}, "loss.microbatch = 100 does not divide batch_size = 256"),
        ({**RUN, "loss": {"beta": 0.5}}, "loss.beta is for loss.name = 'incorrect_pairs', not 'info_nce'"),
        ({**RUN, "loss": {"queue": 64, "mask_groups": False}}, "loss.queue = 64 needs InfoNCE and loss.mask_groups"),
        ({**RUN, "loss": {"bias": -5.0}}, "loss.bias is for loss.name = 'sigmoid', not 'info_nce'"),
        ({**RUN, "loss": {"name": "incorrect_pairs", "alpha": 0.0, "beta": 0.0}}, "loss.alpha, loss.beta .* are all 0"),
    ],
)
def test_impossible_and_contradictory_values_are_refused(problems, settings, problem):
    (found,) = problems(settings)
    assert re.match(problem, found), found


def test_contradictory_values_of_a_second_stage_are_refused():
    told = []
    for overrides in (
        {"first_stage": ""},
        {"rerank.features": "image,crops"},
        {"rerank.features": "image,image"},
        {"rerank.batch_norm": "true"},
        {"rerank.combine": "concatenate"},
        {"rerank.layers": "2"},
        {"rerank.preset": "cross_attention", "rerank.features": "image"},
        {"rerank.negatives": "worst"},
        {"rerank.seeds": "3"},
        {"task": "towers"},
    ):
        with pytest.raises(UserError) as error:
            config.build({"task": "rerank", "first_stage": "w", "steps": 1}, overrides)
        told.append(str(error.value))
    words = (
        "first_stage is missing", "did you mean crop", "each once", "batch_norm is for rerank.preset = 'paper'",
        "combine is for rerank.preset = 'paper'", "layers is for rerank.preset = 'cross_attention'",
        "features is for rerank.preset = 'gated'", "negatives is for rerank.loss = 'binary'", "one seed", "is for task",
    )  # fmt: skip
    assert all(word in message for word, message in zip(words, told, strict=True)), told


def test_every_default_is_one_of_the_choices_and_passes_its_check():
    for key in keys(Config):
        assert not key.declaration.choices or key.default in key.declaration.choices, key.name
        assert not (key.declaration.check and key.declaration.check(key.name, key.default)), key.name


def test_only_a_zero_for_unset_lies_outside_the_limits_of_its_field():
    outside = []
    for key in keys(Config):
        values = key.default if isinstance(key.default, tuple) else (key.default,)
        if key.declaration.limits and any(value not in key.declaration.limits for value in values):
            outside.append((key.name, key.default))
    assert outside == [("data.image_size", 0), ("data.context_length", 0), ("rerank.sampled", 0)]


def test_a_field_depends_only_on_choices_of_another_field():
    by_name = {key.name: key for key in keys(Config)}
    for key in keys(Config):
        if key.declaration.only:
            name, values = key.declaration.only
            assert set(values) < set(by_name[name].declaration.choices), key.name


def test_a_mistyped_choice_does_not_put_the_fields_that_depend_on_it_in_question(problems):
    (problem,) = problems({**RUN, "loss": {"name": "sigmiod", "bias": -5.0}})
    assert problem.endswith("did you mean sigmoid?")


@pytest.mark.parametrize(("field", "value"), [("data.image_size", 4), ("rerank.sampled", 1)])
def test_an_error_names_the_default_that_lies_outside_the_limits(problems, field, value):
    section, name = field.split(".")
    task = {"task": "rerank", "first_stage": "w"} if section == "rerank" else {}
    found = problems({**RUN, **task, section: {name: value}})
    assert re.match(rf"{field} = {value} must be 0 or at least [28]$", found[0])


def test_zero_heads_are_reported_and_not_divided_by(problems):
    settings = {"preset": "cross_attention", "heads": 0, "hidden": 8}
    found = problems({**RUN, "task": "rerank", "first_stage": "w", "rerank": settings})
    assert found == ["rerank.heads = 0 must be at least 1"]
