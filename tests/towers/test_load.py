"""What must be said with a checkpoint that was chosen on the split that it is evaluated on."""

import json

import pytest

from jaxclip import config
from jaxclip.towers.load import chosen_on


@pytest.fixture
def old_run(tmp_path):
    """The workdir of a run that an earlier version trained, before there were validation splits."""
    settings = config.dump(config.build({"steps": 1}))
    del settings["data"]["validation"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_best_step_of_an_earlier_version_was_chosen_on_the_split_that_it_reported(old_run):
    lines = []
    assert config.load_config(old_run).data.validation == 0
    notes = chosen_on(old_run, "best", config.load_config(old_run), lines.append)
    assert notes == lines == [f"--step=best of {old_run} was chosen on the split test, so figures on it are too good"]
    for step, overrides in (("latest", {}), ("7", {}), ("best", {"data.split": "train"})):
        assert chosen_on(old_run, step, config.load_config(old_run, overrides), pytest.fail) == []


def test_the_best_step_of_a_run_with_validation_may_be_evaluated_on_test(tmp_path):
    config.save_config(config.build({"steps": 1}), tmp_path)
    overrides = {"data.validation": "0"}  # of the evaluated catalogue, not of the run
    assert chosen_on(tmp_path, "best", config.load_config(tmp_path, overrides), pytest.fail) == []
