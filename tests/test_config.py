"""A configuration is right in every field, or every mistake is told at once; no default changes unnoticed.

After a wanted change: JAXCLIP_WRITE_GOLDENS=1 python -m pytest tests/test_config.py
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxclip import config
from jaxclip.catalog.readers import READERS
from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.losses.objective import DENSE_ROWS

ROOT = Path(__file__).parents[1]
GOLDENS = Path(__file__).parent / "goldens" / "configs"
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
RUN = {"steps": 1}


def problems(settings, overrides=None):
    """Returns the lines of the error that the settings raise."""
    with pytest.raises(UserError) as raised:
        config.build(settings, overrides)
    message = str(raised.value)
    first, *rest = message.splitlines()
    if not rest:
        return [first.removeprefix("config: ")]
    assert first == f"config: {len(rest)} problems"
    return [line.removeprefix("  - ") for line in rest]


def from_file(name):
    """Returns the configuration of a file of configs/, its catalogue standing at PATH."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "python -m jaxclip." in inspect.getdoc(module), "the docstring says how it is launched"
    given = module.get_config()
    needs_path = given.get("data", {}).get("reader", "drawn") != "drawn"
    return config.build(given, {"data.path": "PATH"} if needs_path else {})


@pytest.mark.parametrize("name", FILES)
def test_no_default_of_a_config_file_changes_unnoticed(name):
    golden, found = GOLDENS / f"{name}.json", json.dumps(config.dump(from_file(name)), indent=2) + "\n"
    if os.environ.get("JAXCLIP_WRITE_GOLDENS") == "1":
        golden.write_text(found)
    assert golden.exists(), f"{golden} is missing: run with JAXCLIP_WRITE_GOLDENS=1 and read what it writes"
    assert json.loads(golden.read_text()) == json.loads(found)


def test_every_golden_belongs_to_a_config_file():
    assert sorted(path.stem for path in GOLDENS.glob("*.json")) == FILES


def test_every_mistake_is_told_at_once_with_the_nearest_name():
    found = problems(
        {
            "batchsize": 8,
            "steps": "many",
            "data": {"image_sise": 64, "reader": "drawing"},
            "optimizer": {"beta1": 2.0},
            "zebra": {"crossing": 1},
        },
        {"learning_rate": "1e-3", "model.dropout": "often"},
    )
    assert found == [
        "batchsize is not a key; did you mean batch_size?",
        "steps = 'many' is not a whole number",
        "data.image_sise is not a key; did you mean data.image_size?",
        "zebra.crossing is not a key; --help lists all",
        "learning_rate is not a key; did you mean optimizer.learning_rate?",
        "model.dropout = 'often' is not a number",
        f"data.reader = 'drawing' is none of {', '.join(READERS)}; did you mean drawn?",
        "optimizer.beta1 = 2.0 must be in [0, 1)",
    ]


def test_a_section_is_not_a_value():
    assert problems({**RUN, "data": 3}) == ["data is a section: set its fields, as data.reader"]
    assert problems(RUN, {"data.columns": "id"}) == ["data.columns is a section: set its fields, as data.columns.id"]


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("batch_size", "64", 64),
        ("batch_size", " 64.0 ", 64),
        ("epochs", "2", 2.0),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", "5", 5.0),
        ("data.lowercase", "false", False),
        ("data.lowercase", "True", True),
        ("data.split", "all", "all"),
        ("data.prepared", "123", "123"),
        ("data.path", "", ""),
        ("data.caption_template", "{name}, {season}", "{name}, {season}"),
        ("augmentation.crop_area", "(0.5, 1)", (0.5, 1.0)),
        ("data.mean", "[0, 0.5, 1]", (0.0, 0.5, 1.0)),
        ("optimizer.rates", "{'^text': 0.1, 'x.y': 0}", (("^text", 0.1), ("x.y", 0.0))),
        ("optimizer.rates", "(('^text', 0.1), ('x.y', 0))", (("^text", 0.1), ("x.y", 0.0))),
        ("optimizer.rates", "{}", ()),
        ("mesh.fsdp", "-1", -1),
    ],
)
def test_a_field_of_every_kind_can_be_overridden(field, text, value):
    overrides = {field: text} | ({"mesh.data": "1"} if field == "mesh.fsdp" else {})
    found = config.build({} if field == "epochs" else RUN, overrides)
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "wanted"),
    [
        ("batch_size", "64.5", "a whole number"),
        ("batch_size", "true", "a whole number"),
        ("batch_size", "1e999", "a whole number"),
        ("data.mean", f"(0, 0, 1{'0' * 400})", "3 numbers"),
        ("batch_size", "", "a whole number"),
        ("optimizer.learning_rate", "fast", "a number"),
        ("optimizer.learning_rate", "1e999", "a number"),
        ("data.lowercase", "1", "true or false"),
        ("data.mean", "(0.5, 0.5)", "3 numbers"),
        ("data.mean", "0.5", "3 numbers"),
        ("augmentation.crop_area", "('a', 'b')", "2 numbers"),
        ("optimizer.rates", "0.1", "pairs"),
        ("optimizer.rates", "'x'", "pairs"),
        ("optimizer.rates", "{'x': 'slow'}", "pairs"),
        ("optimizer.rates", "(('x', 0.1, 2),)", "pairs"),
        ("optimizer.rates", "{1: 0.1}", "pairs"),
        ("data.path", 3, "a text"),
    ],
)
def test_a_value_of_another_kind_is_refused(field, text, wanted):
    section, _, leaf = field.rpartition(".")
    if not isinstance(text, str):
        (problem,) = problems({**RUN, section: {leaf: text}})
    else:
        (problem,) = problems(RUN, {field: text})
    assert problem.startswith(f"{field} = {text!r} is not {wanted}")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(config.fields())), st.text(max_size=12) | st.from_regex(r"[\[{(\-0-9e.,)}\]]{1,12}"))
def test_whatever_is_typed_is_a_configuration_or_a_clear_error(field, text):
    try:
        config.build(RUN, {field: text})
    except UserError as error:
        assert str(error).startswith("config: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(value):
    assert problems({**RUN, "optimizer": {"learning_rate": value}})[0].startswith("optimizer.learning_rate = ")
    assert problems({"steps": value})[0].startswith("steps = ")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "set exactly one of steps and epochs: neither is"),
        ({"steps": 1, "epochs": 1.0}, "set exactly one of steps and epochs: both are set"),
        ({**RUN, "data": {"reader": "table"}}, "data.reader = 'table' needs data.path"),
        (
            {**RUN, "data": {"columns": {"id": "sku"}}},
            "data.columns is for data.reader = table or tfds or webdataset, not 'drawn'",
        ),
        (
            {**RUN, "data": {"path": "shop"}},
            "data.path = 'shop' is not read by data.reader = 'drawn', .* set data.reader to .*folder.*table",
        ),
        ({**RUN, "data": {"test": 0.0}}, "data.test = 0.0 must be a number of products"),
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
        ({**RUN, "seed": 2**31}, "seed = 2147483648 must be a 32-bit number"),
        ({**RUN, "batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({**RUN, "model": {"dropout": 1.5}}, "model.dropout = 1.5 must be in"),
        ({**RUN, "model": {"dropout": 1.0}}, "model.dropout = 1.0 must be in"),
        ({**RUN, "model": {"stochastic_depth": 1.0}}, "model.stochastic_depth = 1.0 must be in"),
        ({**RUN, "optimizer": {"beta2": 1.0}}, "optimizer.beta2 = 1.0 must be in"),
        ({**RUN, "data": {"std": (0.25, 0.0, 0.25)}}, "data.std"),
        ({**RUN, "optimizer": {"epsilon": 0.0}}, "optimizer.epsilon"),
        ({**RUN, "optimizer": {"layer_decay": 0.0}}, r"optimizer.layer_decay = 0.0 must be in \(0, 1\]"),
        ({**RUN, "evaluation": {"zooms": (0.5, 1.0)}}, r"evaluation.zooms = \(0.5, 1.0\) must be factors >= 1"),
        ({**RUN, "optimizer": {"ema": 1.0}}, "optimizer.ema = 1.0 must be in"),
        ({**RUN, "optimizer": {"rates": {"x": -1.0}}}, "optimizer.rates = .* no factor may be negative"),
        (
            {**RUN, "optimizer": {"name": "adam", "weight_decay": 0.1}},
            "optimizer.weight_decay = 0.1 is for adamw and muon: optimizer.name = 'adam' has none",
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
def test_values_that_cannot_be_are_refused(settings, problem):
    (found,) = problems(settings)
    assert re.match(problem, found), found


def test_a_configuration_comes_back_from_its_dump():
    built = config.build(
        {
            "epochs": 2.5,
            "data": {"reader": "table", "path": "x.csv", "columns": {"id": "sku"}, "mean": (0.1, 0.2, 0.3)},
            "optimizer": {"rates": (("^text/.*bias$", 0.5),)},
        },
        {"mesh.fsdp": "2"},
    )
    again = config.build(json.loads(json.dumps(config.dump(built))))
    assert again == built and config.fingerprint(again) == config.fingerprint(built)
    assert config.build(ConfigDict(config.dump(built))) == built


def test_a_regex_with_a_dot_can_stand_in_a_config_file():
    pairs = (("^text/.*bias$", 0.5), (r"[.]", 0.0))
    assert config.build(ConfigDict({**RUN, "optimizer": {"rates": pairs}})).optimizer.rates == pairs
    assert config.build({**RUN, "optimizer": {"rates": dict(pairs)}}).optimizer.rates == pairs


def test_adam_has_no_weight_decay_unless_it_is_asked_for_which_is_told():
    built = config.build({**RUN, "optimizer": {"name": "adam"}})
    assert built.optimizer.weight_decay == 0.0 and config.build(config.dump(built)) == built
    assert config.build(RUN).optimizer.weight_decay == 0.1


def test_a_workdir_gives_its_configuration_back(tmp_path):
    built = config.build(RUN, {"seed": "3"})
    (tmp_path / "config.json").write_text(json.dumps(config.dump(built)))
    assert config.load_config(tmp_path) == built
    assert config.load_config(tmp_path, {"seed": "4"}).seed == 4
    with pytest.raises(UserError, match="is not a workdir"):
        config.load_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        config.load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json"):
        config.load_config(tmp_path)


def test_differences_name_each_field_with_both_values():
    old = config.build(RUN)
    new = config.build(RUN, {"seed": "1", "data.mean": "(0, 0, 0)", "optimizer.rates": "{'a': 0}"})
    assert config.differences(old, old) == []
    lines = config.differences(old, new)
    assert [line.split(":")[0] for line in lines] == ["seed", "data.mean", "optimizer.rates"]
    assert lines[0] == "seed: 0 -> 1"


def test_every_field_changes_the_fingerprint():
    base = config.build(RUN)
    for name, kind in config.fields().items():
        section, _, leaf = name.rpartition(".")
        holder = base
        for part in section.split(".") if section else ():
            holder = getattr(holder, part)
        value = getattr(holder, leaf)
        other = {str: "other", int: 77, float: 0.123, bool: not value}.get(
            kind, (("x", 0.5),) if name == "optimizer.rates" else (7,)
        )
        changed = dataclasses.replace(holder, **{leaf: other})
        while section:
            section, _, leaf = section.rpartition(".")
            outer = base
            for part in section.split(".") if section else ():
                outer = getattr(outer, part)
            changed = dataclasses.replace(outer, **{leaf: changed})
        assert isinstance(changed, Config) and config.fingerprint(changed) != config.fingerprint(base), name


def test_every_field_is_read_somewhere():
    sources = [path.read_text() for path in (ROOT / "jaxclip").rglob("*.py") if path.parent.name != "config"]
    code = "\n".join(sources)
    unread = [name for name in config.fields() if not re.search(rf"\.{name.rsplit('.', 1)[-1]}\b", code)]
    # The columns go to a reader as one mapping; of these two the configuration knows a single value.
    assert [n for n in unread if not n.startswith("data.columns.") and n not in ("loss.name", "task")] == []


def variant_of(name, argument):
    """Returns the configuration that configs/NAME.py:ARGUMENT is."""
    spec = importlib.util.spec_from_file_location("variants", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.build(module.get_config(argument), {"data.prepared": "shop"})


@pytest.mark.parametrize(("batch", "microbatch"), [(32768, 0), (65536, 0), (131072, 65536), (1048576, 65536)])
@pytest.mark.parametrize("preset", ["vit_b_32", "vit_b_16", "vit_l_14"])
def test_a_large_batch_is_trained_tiled_and_beyond_what_fits_at_once_cached(preset, batch, microbatch):
    built = variant_of("pretrain_large_batch", f"{preset},{batch}")
    assert (built.batch_size, built.loss.microbatch, built.model.preset) == (batch, microbatch, preset)
    assert (built.model.dtype, built.model.remat, built.model.execution) == ("bfloat16", "full", "scan")
    assert built.loss.implementation == "auto" and batch > DENSE_ROWS


@pytest.mark.parametrize("argument", ["vit_h_14", "vit_b_16,", "vit_b_16,many"])
def test_what_is_no_large_batch_is_told(argument):
    with pytest.raises(UserError, match=f"configs/pretrain_large_batch.py:{argument} is no PRESET"):
        variant_of("pretrain_large_batch", argument)


@pytest.mark.parametrize("variant", ["gated", "ablation", "paper"])
def test_every_variant_of_the_reranker_is_a_configuration(variant):
    built = variant_of("rerank_fashion_products", variant)
    assert built.rerank.preset == ("paper" if variant == "paper" else "gated")
    assert bool(built.rerank.ablation) == (built.rerank.seeds == 3) == (variant == "ablation")


def test_what_does_not_go_together_in_a_second_stage_is_told():
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


def saved(folder, **settings):
    """Returns a new workdir with the configuration of these settings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.dump(config.build({**RUN, **settings}))))
    return folder


def test_what_a_training_has_settled_cannot_be_set_afterwards(tmp_path):
    workdir = saved(tmp_path / "run")
    given = {"data.split": "all", "evaluation.zooms": "1,1.2", "mesh.fsdp": "2", "data.columns.id": ""}
    assert config.of_run(workdir, given).evaluation.zooms == (1.0, 1.2)
    with pytest.raises(UserError, match=r"^--config\.seed, --config\.data\.lowercase would change nothing: .*run is"):
        config.of_run(workdir, {**given, "seed": "3", "data.lowercase": "false"})
    with pytest.raises(UserError, match="did you mean data.split"):
        config.of_run(workdir, {"data.splt": "all"})
    adapters = saved(tmp_path / "adapters", task="adapter", model={"init_from": "base"})
    assert config.of_run(adapters, {"model.init_from": "moved"}).model.init_from == "moved"
    with pytest.raises(UserError, match="--config.model.init_from would change nothing"):
        config.of_run(workdir, {"model.init_from": "moved"})


def test_what_rerankers_alone_have_is_not_set_for_towers_beside_them(tmp_path):
    towers = saved(tmp_path / "towers")
    reranker = saved(tmp_path / "reranker", task="rerank", first_stage="w")
    given = {"first_stage": "elsewhere", "data.split": "all"}
    first, second = config.of_runs([towers, reranker], given)
    assert (first.first_stage, second.first_stage) == ("", "elsewhere")
    assert first.data.split == second.data.split == "all"
    with pytest.raises(UserError, match="first_stage = 'elsewhere' is for task = 'rerank'"):
        config.of_runs([towers, towers], given)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({}, "test"),
        ({"data.split": "train"}, "train"),
        ({"evaluation.zooms": "1,1.2"}, "test"),
        ({"data.drawn_seed": "7"}, "drawn-4000-seed-7-test"),
        ({"data.drawn_seed": "7", "data.split_seed": "1", "data.drawn_products": "90"}, "drawn-90-seed-7-test"),
        ({"data.drawn_products": "9000", "data.split": "all"}, "drawn-9000-seed-0-all"),
        ({"data.reader": "folder", "data.path": "/shops/one", "data.split": "all"}, "one-all"),
    ],
)
def test_an_evaluation_is_called_by_its_catalogue(tmp_path, overrides, name):
    workdir = saved(tmp_path / "run")
    assert config.evaluation_name(workdir, config.of_run(workdir, overrides)) == name


@pytest.mark.parametrize(
    "overrides",
    [
        {"data.split_seed": "7"},
        {"data.test": "0.5"},
        {"data.path": "/shops/./one", "data.split_seed": "7", "data.prepared": "/elsewhere"},
        {"data.columns.caption": "title"},
        {"data.reader": "webdataset"},
    ],
)
def test_a_runs_own_catalogue_is_not_split_anew(tmp_path, overrides):
    workdir = saved(tmp_path / "run", data={"reader": "table", "path": "/shops/one"})
    with pytest.raises(UserError, match=r"data\.\w+ would split the catalogue that .*run was trained on"):
        config.evaluation_name(workdir, config.of_run(workdir, overrides))
    config.evaluation_name(workdir, config.of_run(workdir, {**overrides, "data.split": "all"}))
    elsewhere = config.of_run(workdir, {**overrides, "data.path": "/shops/two"})
    assert config.evaluation_name(workdir, elsewhere) == "two-test"
