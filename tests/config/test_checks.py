"""Values that are not allowed or contradict each other are refused with a sentence that names them."""

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
        (
            {},
            "set exactly one of steps and epochs: neither is; to evaluate a checkpoint without training, use ",
        ),
        ({"steps": 1, "epochs": 1.0}, "set exactly one of steps and epochs: both are set"),
        ({**RUN, "data": {"reader": "table"}}, "data.reader = 'table' needs data.path"),
        (
            {**RUN, "data": {"columns": {"id": "sku"}}},
            "data.columns applies only with data.reader = 'table', 'tfds' or 'webdataset', not 'drawn'",
        ),
        (
            {**RUN, "data": {"path": "shop"}},
            "data.path = 'shop' is not read by data.reader = 'drawn', .* set data.reader to .*folder.*table",
        ),
        ({**RUN, "data": {"test": 0.0}}, "data.test = 0.0 must be greater than 0"),
        ({**RUN, "data": {"image_size": 72}}, "data.image_size = 72 is not a multiple of the patch .* nearest is 64"),
        (
            {**RUN, "model": {"patch": 128}},
            "data.image_size = 64 is not a multiple of model.patch, 128; the nearest is 128",
        ),
        (
            {**RUN, "model": {"patch": 10}, "data": {"image_size": 60}},
            "model.patch = 10 must be a power of two: the stem of",
        ),
        ({**RUN, "model": {"init_from": "W", "patch": 8}}, "model.patch comes from model.init_from: leave it out"),
        ({**RUN, "data": {"resize_on": "gpu"}}, "data.resize_on = 'gpu' is not one of auto, host, device"),
        ({**RUN, "data": {"caption_template": "{season}"}}, "data.caption_template: .* lacks {name}"),
        (
            {**RUN, "augmentation": {"queries": 1.5}, "data": {"queries": "q.csv"}},
            r"augmentation.queries = 1.5 must be in \[0, 1\]",
        ),
        ({**RUN, "augmentation": {"crop_area": (0.9, 0.5)}}, r"augmentation.crop_area = \(0.9, 0.5\) must be an"),
        ({**RUN, "augmentation": {"crop_area": (0.5, 1.5)}}, "augmentation.crop_area"),
        ({**RUN, "augmentation": {"crop_aspect": (0.0, 1.0)}}, "augmentation.crop_aspect"),
        ({**RUN, "mesh": {"data": -1, "fsdp": -1}}, "mesh = .* at most one may be -1"),
        ({**RUN, "mesh": {"tensor": 0}}, "mesh = .* each must be >= 1;"),
        ({**RUN, "mesh": {"slices": -1}}, "mesh.slices = -1 must be at least 0"),
        ({**RUN, "mesh": {"data": 6, "slices": 4}}, "mesh.data = 6 is not a multiple of mesh.slices = 4"),
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
            "optimizer.weight_decay applies only with optimizer.name = 'adamw' or 'muon', not 'adam'",
        ),
        ({**RUN, "task": "adapter"}, "task = 'adapter' needs model.init_from"),
        ({**RUN, "lora": {"rank": 4}}, "lora applies only with task = 'adapter', not 'towers'"),
        ({**RUN, "task": "adapter", "model": {"init_from": "W"}, "lora": {"alpha": 0.0}}, "lora.alpha = 0.0 must be"),
        ({**RUN, "task": "adapter", "model": {"init_from": "W"}, "lora": {"rank": 0}}, "lora.rank = 0 must be"),
        ({**RUN, "model": {"preset": "vit_b_16"}, "loss": {"name": "siglip"}}, "loss.name = 'siglip' is not one of"),
        ({**RUN, "loss": {"implementation": "tilde"}}, ".* dense, tiled; did you mean tiled?"),
        ({**RUN, "loss": {"microbatch": 100}}, "loss.microbatch = 100 does not divide batch_size = 256"),
        ({**RUN, "loss": {"beta": 0.5}}, "loss.beta applies only with loss.name = 'incorrect_pairs', not 'info_nce'"),
        ({**RUN, "loss": {"queue": 64, "mask_groups": False}}, "loss.queue = 64 needs InfoNCE and loss.mask_groups"),
        ({**RUN, "loss": {"bias": -5.0}}, "loss.bias applies only with loss.name = 'sigmoid', not 'info_nce'"),
        ({**RUN, "loss": {"name": "incorrect_pairs", "alpha": 0.0, "beta": 0.0}}, "loss.alpha, loss.beta .* are all 0"),
    ],
)
def test_impossible_and_contradictory_values_are_refused(problems, settings, problem):
    (actual,) = problems(settings)
    assert re.match(problem, actual), actual


def test_contradictory_values_of_a_second_stage_are_refused():
    messages = []
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
        messages.append(str(error.value))
    words = (
        "first_stage is missing", "did you mean crop", "each only once",
        "batch_norm applies only with rerank.preset = 'paper'", "combine applies only with rerank.preset = 'paper'",
        "layers applies only with rerank.preset = 'cross_attention'",
        "features applies only with rerank.preset = 'gated'", "negatives applies only with rerank.loss = 'binary'",
        "one seed", "applies only with task",
    )  # fmt: skip
    assert all(word in message for word, message in zip(words, messages, strict=True)), messages


def test_every_default_is_one_of_the_choices_and_passes_its_check():
    for key in keys(Config):
        assert not key.declaration.choices or key.default in key.declaration.choices, key.name
        assert not (key.declaration.check and key.declaration.check(key.name, key.default)), key.name


def test_a_default_outside_its_limits_means_unset():
    outside = []
    for key in keys(Config):
        values = key.default if isinstance(key.default, tuple) else (key.default,)
        if key.declaration.limits and any(value not in key.declaration.limits for value in values):
            outside.append((key.name, key.default))
    assert outside == [
        ("data.validation", -1.0),
        ("data.image_size", 0),
        ("data.context_length", 0),
        ("rerank.sampled", 0),
    ]


def test_a_field_depends_only_on_choices_of_another_field():
    by_name = {key.name: key for key in keys(Config)}
    for key in keys(Config):
        if key.declaration.only:
            name, values = key.declaration.only
            assert set(values) < set(by_name[name].declaration.choices), key.name


def test_fields_that_depend_on_a_mistyped_choice_are_not_reported(problems):
    (problem,) = problems({**RUN, "loss": {"name": "sigmiod", "bias": -5.0}})
    assert problem.endswith("did you mean sigmoid?")


@pytest.mark.parametrize(("field", "value"), [("data.image_size", 4), ("rerank.sampled", 1)])
def test_an_error_names_the_default_that_lies_outside_the_limits(problems, field, value):
    section, name = field.split(".")
    task = {"task": "rerank", "first_stage": "w"} if section == "rerank" else {}
    problem, *_ = problems({**RUN, **task, section: {name: value}})
    assert re.match(rf"{field} = {value} must be 0 or at least [28]$", problem)


def test_zero_heads_are_reported_without_a_division_by_zero(problems):
    settings = {"preset": "cross_attention", "heads": 0, "hidden": 8}
    assert problems({**RUN, "task": "rerank", "first_stage": "w", "rerank": settings}) == [
        "rerank.heads = 0 must be at least 1"
    ]
