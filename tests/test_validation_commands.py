"""The best checkpoint is chosen on validation, figures are of test, and a run without validation has no best one."""

import json
import shutil

import numpy as np
import pytest

from jaxclip import config
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.pipeline.records import Records
from jaxclip.towers.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

WITHOUT = "--config.data.validation=0"
NEW_FIELDS = ("validation", "product", "sources", "queries")


@pytest.fixture(scope="module")
def without_validation(run, config_file, tmp_path_factory):
    """The workdir of a run without a validation split; tests copy it and must not change it."""
    workdir = tmp_path_factory.mktemp("runs") / "without"
    done = run("train", f"--config={config_file}", f"--workdir={workdir}", WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "there is no validation split: the split test is ranked, and no checkpoint is the best" in done.stderr
    return workdir


def rows_with(workdir, name):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[name] for row in rows if name in row}


def test_best_is_the_checkpoint_with_the_highest_hit_rate_on_validation_and_test_is_reported(run, trained, tmp_path):
    logged, saved = rows_with(trained, "hit@1"), Checkpoints(trained, read_only=True).steps()
    assert not rows_with(trained, "test/hit@1") and set(logged) == {5, 10, 12}
    best = max((step for step in saved if step in logged), key=logged.__getitem__)
    assert Checkpoints(trained, read_only=True).best() == best
    workdir = tmp_path / "moved"
    shutil.copytree(trained, workdir)
    done = run("evaluate", f"--workdir={workdir}", "--step=best", "--config.data.split=validation")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "validation" / "metrics.json").read_text())
    assert metrics["checkpoint_step"] == best
    assert metrics["text_to_image"]["hit@1"]["value"] == pytest.approx(logged[best])
    assert metrics["notes"] == [trained_groups.CHOSEN_ON]
    assert trained_groups.CHOSEN_ON in done.stdout
    assert trained_groups.CHOSEN_ON in (workdir / "eval" / "validation" / "report.html").read_text()
    reported = json.loads((trained / "eval" / "test" / "metrics.json").read_text())
    assert reported["notes"] == [] and reported["settings"]["split"] == "test"
    assert reported["queries"] == metrics["queries"] == 30


def test_without_validation_there_is_no_best_checkpoint_and_the_test_products_are_the_same(
    run, trained, without_validation
):
    assert not rows_with(without_validation, "hit@1") and set(rows_with(without_validation, "test/hit@1")) == {
        5,
        10,
        12,
    }
    done = run("evaluate", f"--workdir={without_validation}", "--step=best")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    for words in ("--step=best", "train with data.validation and evaluation.every", "give latest or one of 10, 12"):
        assert words in done.stderr
    ids = []
    for workdir in (trained, without_validation):
        prepared = prepared_data.prepared_dataset(config.load_config(workdir), say=pytest.fail)
        ids.append({split: {product.id for product, _ in Records(prepared, split).products()}
                    for split in ("train", "test")})  # fmt: skip
    assert ids[0]["test"] == ids[1]["test"] and ids[0]["train"] < ids[1]["train"]


def as_of_an_earlier_version(workdir):
    """Removes what an earlier version did not write, and the last checkpoint."""
    settings = json.loads((workdir / "config.json").read_text())
    for name in NEW_FIELDS:
        del settings["data"][name]
    (workdir / "config.json").write_text(json.dumps(settings))
    (workdir / "trained_groups.npy").unlink()
    shutil.rmtree(workdir / "checkpoints" / "12")
    shutil.rmtree(workdir / "eval")


def test_a_run_of_an_earlier_version_is_resumed_without_a_validation_split(
    run, config_file, without_validation, read_params, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(without_validation, workdir)
    as_of_an_earlier_version(workdir)
    refused = run("train", f"--config={config_file}", f"--workdir={workdir}")
    assert refused.returncode == 2 and "data.validation: 0.0 -> -1.0" in refused.stderr
    done = run("train", f"--config={config_file}", f"--workdir={workdir}", WITHOUT)
    assert done.returncode == 0 and "resuming from step 10 of" in done.stderr, done.stderr
    for name, leaf in read_params(without_validation, 12).items():
        np.testing.assert_array_equal(read_params(workdir, 12)[name], leaf, err_msg=name)
    np.testing.assert_array_equal(trained_groups.read(workdir), trained_groups.read(without_validation))
