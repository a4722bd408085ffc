"""Adapters for a trained run are trained, killed, resumed and evaluated in real processes."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
LAST = 12


def arguments(continued_file, base, workdir):
    """Returns the arguments that train adapters for the run `base`."""
    return [
        "train",
        f"--config={continued_file}",
        f"--workdir={workdir}",
        "--config.task=adapter",
        f"--config.model.init_from={base}",
        "--config.lora.dropout=0.1",
        "--config.optimizer.warmup_steps=7",
        "--config.optimizer.ema=0.5",
        "--config.optimizer.rates=(('^logit_scale$', 1.0),)",
    ]


@pytest.fixture(scope="module")
def adapted(run, continued_file, trained, tmp_path_factory):
    """The workdir of an uninterrupted run that trains adapters for `trained`, with a moving average."""
    workdir = tmp_path_factory.mktemp("runs") / "adapted"
    done = run(*arguments(continued_file, trained, workdir))
    assert done.returncode == 0, done.stderr
    assert "optimizer.warmup_steps = 7 is more than half of this run's 12 steps: 6 are used" in done.stderr
    assert f"beginning from {trained}" in done.stderr
    assert "not averaged" in done.stdout and "of the moving average" in done.stdout
    return workdir


def metadata_file(workdir):
    return workdir / "checkpoints" / str(LAST) / "beside" / "metadata"


def metrics(workdir, name="test"):
    return json.loads((workdir / "eval" / name / "metrics.json").read_text())


def test_a_checkpoint_has_only_the_trained_parameters_and_names_its_base(adapted, trained, read_params):
    params = read_params(adapted, LAST)
    assert len(params) == 2 * 4 * 2 + 1
    assert all("'lora'" in name or "logit_scale" in name for name in params)
    base = json.loads(metadata_file(adapted).read_text())["base"]
    assert base["name"] == str(trained) and base["step"] == LAST
    assert base["checksum"] == json.loads(metadata_file(trained).read_text())["checksum"]


def test_the_curve_has_the_metrics_of_the_moving_average_and_of_the_raw_parameters(adapted, read_rows):
    evaluated = [row for row in read_rows(adapted) if "hit@1" in row]
    assert [row["step"] for row in evaluated] == [5, 10, 12]
    assert all({"hit@1", "ema/hit@1", "mrr", "ema/mrr"} <= row.keys() for row in evaluated)
    assert any(row["mrr"] != row["ema/mrr"] for row in evaluated)
    assert metrics(adapted)["parameters"] == "ema" and metrics(adapted, "test-raw")["parameters"] == "raw"
    for name, key in (("test", "ema/mrr"), ("test-raw", "mrr")):
        assert metrics(adapted, name)["text_to_image"]["mrr"]["value"] == evaluated[-1][key]


def test_a_killed_and_resumed_run_ends_bit_identical(
    start, run, continued_file, trained, adapted, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "killed"
    process = start(*arguments(continued_file, trained, workdir))
    while not (workdir / "checkpoints" / "4").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = run(*arguments(continued_file, trained, workdir))
    assert done.returncode == 0 and "resuming from step" in done.stderr, done.stderr
    expected, resumed = read_params(adapted, LAST), read_params(workdir, LAST)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(resumed[name], leaf, err_msg=name)
    saved, expected = (json.loads(metadata_file(folder).read_text()) for folder in (workdir, adapted))
    for name in ("checksum", "optimizer_checksum", "ema_checksum"):
        assert saved[name] == expected[name]
    assert read_rows(workdir) == read_rows(adapted)


def test_evaluate_loads_a_moved_base_and_uses_the_moving_average_by_default(run, adapted, trained, tmp_path):
    workdir, base = tmp_path / "moved", tmp_path / "base"
    shutil.copytree(adapted, workdir, ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(trained, base)
    done = run("evaluate", f"--workdir={workdir}", f"--config.model.init_from={base}")
    assert done.returncode == 0 and "parameters: ema" in done.stdout, done.stderr
    assert metrics(workdir) == metrics(adapted)
    done = run("evaluate", f"--workdir={workdir}", "--parameters=raw")
    assert done.returncode == 0 and "parameters: raw" in done.stdout, done.stderr
    assert metrics(workdir, "test-raw") == metrics(adapted, "test-raw")


def test_a_wrong_base_or_a_missing_average_is_reported(run, continued_file, adapted, trained, tmp_path):
    workdir = tmp_path / "other"
    shutil.copytree(adapted, workdir)
    metadata = json.loads(metadata_file(workdir).read_text())
    metadata["base"]["checksum"] ^= 1
    metadata_file(workdir).write_text(json.dumps(metadata))
    for command, words in (
        (["evaluate", f"--workdir={workdir}"], f"{trained} (step {LAST}) is not what the adapters were trained on"),
        (
            ["evaluate", f"--workdir={adapted}", f"--config.model.init_from={tmp_path / 'no'}"],
            "is neither a folder nor",
        ),
        (["export", f"--workdir={trained}", f"--output={tmp_path / 'new'}", "--nomerge"], "--nomerge is for adapters"),
        (["evaluate", f"--workdir={trained}", "--parameters=ema"], "has no moving average of step 12"),
        (arguments(continued_file, adapted, tmp_path / "new"), "holds only adapters"),
    ):
        done = run(*command)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "new" / "config.json").exists()


def test_a_run_with_a_locked_image_tower_leaves_it_unchanged_and_no_longer_needs_its_base(
    run, continued_file, trained, tmp_path, read_params
):
    base, workdir = tmp_path / "base", tmp_path / "locked"
    shutil.copytree(trained, base)
    locked = ["--config.optimizer.rates={'^image/': 0.0}", "--config.optimizer.layer_decay=0.8", "--config.steps=4"]
    done = run(
        "train", f"--config={continued_file}", f"--workdir={workdir}", f"--config.model.init_from={base}", *locked
    )
    assert done.returncode == 0, done.stderr
    before, after = read_params(base, LAST), read_params(workdir, 4)
    assert before.keys() == after.keys()
    for name, leaf in before.items():
        assert np.array_equal(leaf, after[name]) == name.startswith("['image']"), name
    shutil.rmtree(base)
    done = run("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0 and "parameters: raw" in done.stdout, done.stderr
