"""Settings and overrides are converted to a typed configuration, or every mistake is reported at once."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxclip import config
from jaxclip.catalog.readers import READERS
from jaxclip.config import Config
from jaxclip.config.declare import value_of
from jaxclip.errors import UserError

ROOT = Path(__file__).parents[2]
RUN = {"steps": 1}


def test_every_mistake_is_reported_at_once_with_the_nearest_name(problems):
    reported = problems(
        {
            "batchsize": 8,
            "steps": "many",
            "data": {"image_sise": 64, "reader": "drawing"},
            "optimizer": {"beta1": 2.0},
            "zebra": {"crossing": 1},
        },
        {"learning_rate": "1e-3", "model.dropout": "often"},
    )
    assert reported == [
        "batchsize is not a key; did you mean batch_size?",
        "steps = 'many' is not a whole number",
        "data.image_sise is not a key; did you mean data.image_size?",
        "zebra.crossing is not a key; --help lists all",
        "learning_rate is not a key; did you mean optimizer.learning_rate?",
        "model.dropout = 'often' is not a number",
        f"data.reader = 'drawing' is not one of {', '.join(READERS)}; did you mean drawn?",
        "optimizer.beta1 = 2.0 must be in [0, 1)",
    ]


def test_a_section_is_not_a_value(problems):
    assert problems({**RUN, "data": 3}) == ["data is a section: set its fields, such as data.reader"]
    assert problems(RUN, {"data.columns": "id"}) == [
        "data.columns is a section: set its fields, such as data.columns.id"
    ]


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
def test_a_field_of_every_type_can_be_overridden(field, text, value):
    overrides = {field: text} | ({"mesh.data": "1"} if field == "mesh.fsdp" else {})
    built = config.build({} if field == "epochs" else RUN, overrides)
    actual = value_of(built, field)
    assert actual == value and type(actual) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "expected"),
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
def test_a_value_of_another_type_is_refused(problems, field, text, expected):
    section, _, leaf = field.rpartition(".")
    if not isinstance(text, str):
        (problem,) = problems({**RUN, section: {leaf: text}})
    else:
        (problem,) = problems(RUN, {field: text})
    assert problem.startswith(f"{field} = {text!r} is not {expected}")


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(config.fields())), st.text(max_size=12) | st.from_regex(r"[\[{(\-0-9e.,)}\]]{1,12}"))
def test_any_text_gives_a_configuration_or_a_clear_error(field, text):
    try:
        config.build(RUN, {field: text})
    except UserError as error:
        assert str(error).startswith("config: ")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(problems, value):
    assert problems({**RUN, "optimizer": {"learning_rate": value}})[0].startswith("optimizer.learning_rate = ")
    assert problems({"steps": value})[0].startswith("steps = ")


def test_building_a_dump_restores_the_configuration():
    built = config.build(
        {
            "epochs": 2.5,
            "data": {"reader": "table", "path": "x.csv", "columns": {"id": "sku"}, "mean": (0.1, 0.2, 0.3)},
            "optimizer": {"rates": (("^text/.*bias$", 0.5),)},
        },
        {"mesh.fsdp": "2"},
    )
    rebuilt = config.build(json.loads(json.dumps(config.dump(built))))
    assert rebuilt == built and config.fingerprint(rebuilt) == config.fingerprint(built)
    assert config.build(ConfigDict(config.dump(built))) == built


def test_a_config_file_may_contain_a_regex_with_a_dot():
    pairs = (("^text/.*bias$", 0.5), (r"[.]", 0.0))
    assert config.build(ConfigDict({**RUN, "optimizer": {"rates": pairs}})).optimizer.rates == pairs
    assert config.build({**RUN, "optimizer": {"rates": dict(pairs)}}).optimizer.rates == pairs


def test_adam_has_no_weight_decay():
    built = config.build({**RUN, "optimizer": {"name": "adam"}})
    assert built.optimizer.weight_decay == 0.0 and config.build(config.dump(built)) == built
    assert config.build(RUN).optimizer.weight_decay == 0.1


def test_load_config_restores_the_configuration_of_a_workdir(tmp_path):
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
        holder = value_of(base, section) if section else base
        value = getattr(holder, leaf)
        other = {str: "other", int: 77, float: 0.123, bool: not value}.get(
            kind, (("x", 0.5),) if name == "optimizer.rates" else (7,)
        )
        changed = dataclasses.replace(holder, **{leaf: other})
        while section:
            section, _, leaf = section.rpartition(".")
            outer = value_of(base, section) if section else base
            changed = dataclasses.replace(outer, **{leaf: changed})
        assert isinstance(changed, Config) and config.fingerprint(changed) != config.fingerprint(base), name


def test_every_field_is_read_somewhere():
    sources = [path.read_text() for path in (ROOT / "jaxclip").rglob("*.py") if path.parent.name != "config"]
    code = "\n".join(sources)
    unread = [name for name in config.fields() if not re.search(rf"\.{name.rsplit('.', 1)[-1]}\b", code)]
    # A reader gets the columns as one mapping.
    assert [name for name in unread if not name.startswith("data.columns.")] == []


def test_save_config_writes_what_load_config_reads(tmp_path):
    built = config.build(RUN, {"seed": "3"})
    config.save_config(built, tmp_path / "new" / "run")
    assert config.load_config(tmp_path / "new" / "run") == built
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["config.json"]
