"""The configuration of a trained run: which fields can be overridden, and how its evaluations are named."""

import json

import pytest

from jaxclip import config
from jaxclip.errors import UserError

RUN = {"steps": 1}


def make_workdir(folder, **settings):
    """Returns a new workdir with the configuration of these settings."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.dump(config.build({**RUN, **settings}))))
    return folder


def test_fields_fixed_by_training_cannot_be_overridden_afterwards(tmp_path):
    workdir = make_workdir(tmp_path / "run")
    overrides = {"data.split": "all", "evaluation.zooms": "1,1.2", "mesh.fsdp": "2", "data.columns.id": ""}
    assert config.of_run(workdir, overrides).evaluation.zooms == (1.0, 1.2)
    with pytest.raises(UserError, match=r"^--config\.seed, --config\.data\.lowercase cannot be changed .*run"):
        config.of_run(workdir, {**overrides, "seed": "3", "data.lowercase": "false"})
    with pytest.raises(UserError, match="did you mean data.split"):
        config.of_run(workdir, {"data.splt": "all"})
    adapters = make_workdir(tmp_path / "adapters", task="adapter", model={"init_from": "base"})
    assert config.of_run(adapters, {"model.init_from": "moved"}).model.init_from == "moved"
    with pytest.raises(UserError, match="--config.model.init_from cannot be changed after training"):
        config.of_run(workdir, {"model.init_from": "moved"})


def test_overrides_for_rerankers_do_not_reach_the_towers(tmp_path):
    towers = make_workdir(tmp_path / "towers")
    reranker = make_workdir(tmp_path / "reranker", task="rerank", first_stage="w")
    overrides = {"first_stage": "elsewhere", "data.split": "all"}
    first, second = config.of_runs([towers, reranker], overrides)
    assert (first.first_stage, second.first_stage) == ("", "elsewhere")
    assert first.data.split == second.data.split == "all"
    with pytest.raises(UserError, match="first_stage applies only with task = 'rerank', not 'towers'"):
        config.of_runs([towers, towers], overrides)


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
def test_an_evaluation_is_named_after_its_catalogue(tmp_path, overrides, name):
    workdir = make_workdir(tmp_path / "run")
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
def test_the_catalogue_of_a_run_cannot_be_split_differently(tmp_path, overrides):
    workdir = make_workdir(tmp_path / "run", data={"reader": "table", "path": "/shops/one"})
    with pytest.raises(UserError, match=r"data\.\w+ would split the catalogue that .*run was trained on"):
        config.evaluation_name(workdir, config.of_run(workdir, overrides))
    config.evaluation_name(workdir, config.of_run(workdir, {**overrides, "data.split": "all"}))
    elsewhere = config.of_run(workdir, {**overrides, "data.path": "/shops/two"})
    assert config.evaluation_name(workdir, elsewhere) == "two-test"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"data.split_seed": "7"}, "test-split_seed-7"),
        ({"data.test": "0.5", "data.validation": "0", "data.split": "all"}, "all-test-0.5-validation-0"),
        ({"data.path": "/shops/./one", "data.test": "24", "data.split": "validation"}, "validation-test-24"),
        ({"data.columns.caption": "title"}, "one-test"),
        ({"data.path": "/shops/two", "data.split_seed": "7"}, "two-test"),
    ],
)
def test_a_run_that_knows_its_training_groups_may_have_its_catalogue_split_in_another_way(tmp_path, overrides, name):
    workdir = make_workdir(tmp_path / "run", data={"reader": "table", "path": "/shops/one"})
    (workdir / "trained_groups.npy").touch()
    assert config.evaluation_name(workdir, config.of_run(workdir, overrides)) == name
    reranker = make_workdir(tmp_path / "reranker", task="rerank", first_stage=str(workdir),
                            data={"reader": "table", "path": "/shops/two"})  # fmt: skip
    (reranker / "trained_groups.npy").touch()
    own = {**overrides, "data.path": "/shops/one"}
    config.evaluation_name(reranker, config.of_run(reranker, own))
    (workdir / "trained_groups.npy").unlink()
    if overrides.get("data.split") != "all":
        with pytest.raises(UserError, match=rf"{workdir} has no trained_groups.npy by which they could be recognised"):
            config.evaluation_name(reranker, config.of_run(reranker, own))
