"""Commands run as real processes: bad input gives one clear sentence, and no file is left partly written."""

import json
import os
import shutil
import subprocess
from fnmatch import fnmatch

import numpy as np
import pytest

from jaxclip import config
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.runtime import startup


def modification_times(*folders):
    """Returns path -> time of the last change in ns (None for a folder) for everything in the folders."""
    return {
        path: path.stat().st_mtime_ns if path.is_file() else None
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(done, *words):
    """Checks that a command reported bad input with these words; returns the lines of its message."""
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    message = done.stderr[done.stderr.index("error: ") :]
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert all(word in message for word in words), message
    return message.strip().splitlines()


@pytest.fixture
def refuse(run, cache, tmp_path):
    """Runs a command that must refuse its input and leave all files unchanged."""

    def refuse(command, *arguments, words):
        before = modification_times(cache, tmp_path)
        lines = assert_refused(run(command, *arguments), *words)
        assert modification_times(cache, tmp_path) == before
        return lines

    return refuse


def test_a_mistyped_key_is_reported_with_the_nearest_name(refuse, config_file, tmp_path):
    lines = refuse(
        "train",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.optimizer.learning_rat=0.1",
        words=["optimizer.learning_rat", "did you mean optimizer.learning_rate?"],
    )
    assert len(lines) == 1


def test_all_mistakes_of_a_configuration_are_reported_at_once(refuse, config_file, tmp_path):
    lines = refuse(
        "train",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.batch_size=many",
        "--config.modle.preset=tiny",
        "--config.epochs=3",
        words=[
            "3 problems",
            "batch_size = 'many' is not a whole number",
            "modle.preset",
            "model.preset",
            "both are set",
        ],
    )
    assert len(lines) == 4


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_missing_flag_is_reported(refuse, command):
    refuse(command, words=[{"train": "--config is missing", "evaluate": "--workdir is missing"}[command]])


def test_a_workdir_of_another_configuration_is_refused_with_the_differing_keys(refuse, config_file, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    other = config.build({"steps": 77, "optimizer": {"learning_rate": 0.5}})
    (workdir / "config.json").write_text(json.dumps(config.dump(other)))
    lines = refuse(
        "train",
        f"--config={config_file}",
        f"--workdir={workdir}",
        words=["steps: 77 -> 12", "optimizer.learning_rate: 0.5 -> 0.001", "model.preset", "another --workdir"],
    )
    assert len(lines) == 1 and "checkpoint.every" not in lines[0]


def test_evaluating_a_folder_that_is_not_a_workdir_is_refused(refuse, tmp_path):
    (tmp_path / "pictures").mkdir()
    refuse("evaluate", f"--workdir={tmp_path / 'pictures'}", words=["pictures is not a workdir", "config.json"])
    refuse("evaluate", f"--workdir={tmp_path / 'nowhere'}", words=["nowhere is not a workdir"])


@pytest.mark.parametrize("command", ["evaluate", "search", "export"])
def test_fields_fixed_by_training_cannot_be_overridden_afterwards(refuse, tmp_path, command):
    (tmp_path / "config.json").write_text(json.dumps(config.dump(config.build({"steps": 12}))))
    fixed = ["--config.model.patch=8", "--config.data.image_size=32", "--config.optimizer.ema=0.9"]
    arguments = [f"--workdir={tmp_path}", *fixed, "--config.data.split=all"]
    output = [f"--output={tmp_path / 'out'}"] if command == "export" else []
    message = "--config.model.patch, --config.data.image_size, --config.optimizer.ema cannot be changed after training"
    refuse(command, *arguments, *output, words=[message, str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--query=red shoes", "--query=  "], ["--query is empty"]),
        (["--name=../elsewhere"], ["--name='../elsewhere'", "name of a folder"]),
        (["--name="], ["--name=''"]),
        (["--parameters=averaged"], ["--parameters=averaged is not one of ema, raw"]),
        (["--config.data.path=shop"], ["data.path = 'shop' is not read by data.reader = 'drawn'", "folder", "table"]),
        (["--config.data.split_seed=7"], ["data.split_seed", "was trained on", "split test", "data.split=all"]),
        (["--config.data.drawn_products=9000"], ["data.drawn_products", "was trained on"]),
    ],
)
def test_an_impossible_evaluation_is_refused_before_it_starts(refuse, tmp_path, flags, words):
    (tmp_path / "config.json").write_text(json.dumps(config.dump(config.build({"steps": 12}))))
    refuse("evaluate", f"--workdir={tmp_path}", *flags, words=words)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        ("evaluate", ["--workdir={0}", "--step=best", "--name=x"], ["--workdir, --name, --step cannot be used with"]),
        ("evaluate", ["--config.model.init_from="], ["nothing to evaluate", "--workdir", "--config.model.init_from"]),
        ("train", ["--config.steps=0"], ["neither is", "python -m jaxclip.evaluate", "--config.model.init_from"]),
    ],
)
def test_flags_that_contradict_an_evaluation_without_a_workdir_are_refused(
    refuse, config_file, tmp_path, command, flags, words
):
    refuse(command, f"--config={config_file}", *(flag.format(tmp_path) for flag in flags), words=words)


def test_a_folder_for_results_is_refused_with_a_workdir_which_has_its_own(refuse, tmp_path):
    refuse("evaluate", f"--workdir={tmp_path}", f"--output={tmp_path}", words=["--output is only", "give --name"])


def test_an_empty_name_among_workdirs_is_refused(refuse, tmp_path):
    refuse(
        "evaluate",
        f"--workdir={tmp_path},,{tmp_path}",
        "--query=shoes",
        words=["has an empty name: remove the extra comma"],
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "prepare", "search"])
def test_help_lists_flags_and_configuration_fields(run, command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"python -m jaxclip.{command}" in done.stdout
    expected = {
        "train": ["--workdir", "--config:", "optimizer.learning_rate", "mesh.fsdp", "{'^image/stem': 0.0}"],
        "evaluate": [
            "--workdir",
            "--step",
            "--name",
            "--output",
            "--config:",
            "--config.model.init_from=CHECKPOINT",
            "optimizer.learning_rate",
            "data.path",
        ],
        "prepare": ["--config:", "data.reader", "data.path"],
        "search": ["--workdir", "--rerank", "--gallery", "--port", "--host", "--token", "data.reader"],
    }[command]
    assert not [word for word in expected if word not in done.stdout]


def test_help_for_a_word_lists_only_the_fields_that_contain_it(run):
    done = run("train", "--help=optimizer")
    assert done.returncode == 0
    assert "optimizer.learning_rate = 0.001" in done.stdout and "--workdir" not in done.stdout
    assert [line.split(".")[0] for line in done.stdout.splitlines()[1:]] == ["  optimizer"] * 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "devices", "platforms", "expected"),
    [
        (True, [], None, [("jax_platforms", "cpu")]),
        (False, [], None, []),
        (True, ["/dev/accel0"], None, []),
        (True, [], "cpu", []),
    ],
)
def test_libtpu_is_not_loaded_on_machines_without_tpus(monkeypatch, installed, devices, platforms, expected):
    updates = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(startup.glob, "glob", lambda pattern: [path for path in devices if fnmatch(path, pattern)])
    monkeypatch.setattr(startup.jax.config, "update", lambda *setting: updates.append(setting))
    startup.avoid_loading_libtpu()
    assert updates == expected


def test_a_missing_catalogue_is_reported(refuse, config_file, tmp_path):
    path = tmp_path / "nowhere"
    refuse(
        "train",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.reader=folder",
        f"--config.data.path={path}",
        words=[f"no catalogue at {path}"],
    )


@pytest.mark.slow
def test_a_table_without_a_required_column_is_refused_and_its_columns_are_listed(refuse, config_file, tmp_path):
    (tmp_path / "shop.csv").write_text("sku,photo,price\n1,a.jpg,3\n")
    refuse(
        "train",
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.reader=table",
        f"--config.data.path={tmp_path / 'shop.csv'}",
        words=["shop.csv", "sku, photo, price", "--config.data.columns.image"],
    )


@pytest.mark.slow
def test_a_catalogue_without_a_readable_picture_is_refused(refuse, tmp_path):
    (tmp_path / "shop" / "shirts").mkdir(parents=True)
    (tmp_path / "shop" / "shirts" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    refuse(
        "prepare",
        "--config.data.reader=folder",
        f"--config.data.path={tmp_path / 'shop'}",
        words=[str(tmp_path / "shop"), "no product has a readable image"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.optimizer.rates={'(': 0.1}", ["config.optimizer.rates", "not a regular expression"]),
        ("--config.mesh.data=3", ["config.mesh", "3 x 1 x 1", "1 devices"]),
        ("--config.mesh.slices=2", ["config.mesh.data = 1", "number of slices, 2"]),
        ("--config.batch_size=4000", ["batch_size = 4000", "training products"]),
    ],
)
def test_mistakes_that_depend_on_data_or_devices_are_reported_before_the_workdir_is_made(
    refuse, config_file, catalogue, tmp_path, override, words
):
    refuse("train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", override, words=words)


@pytest.mark.slow
def test_a_missing_checkpoint_is_reported_and_the_existing_ones_are_listed(refuse, trained):
    before = modification_times(trained)
    refuse("evaluate", f"--workdir={trained}", "--step=99", words=["--step=99", "latest, best, ", "10, 12"])
    assert modification_times(trained) == before


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_previous_checkpoint_stays_intact(
    run, config_file, trained, tmp_path, read_params
):
    namespace = ["unshare", "-rm", "sh", "-c"]
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*namespace, f"mount -t tmpfs none {disk}"]).returncode:
        pytest.skip("this system does not let users mount file systems")
    size = int(1.5 * 3 * sum(leaf.nbytes for leaf in read_params(trained, 12).values()))
    script = f'mount -t tmpfs -o size={size} none {disk}; "$@"; status=$?; cp -r {disk}/run {copy}; exit $status'
    done = run("train", f"--config={config_file}", f"--workdir={disk / 'run'}", prefix=(*namespace, script, "sh"))
    lines = assert_refused(done, "disk of", "is full", "checkpoint of step 4", "the checkpoint of step 2 is intact")
    assert len(lines) == 1
    assert os.listdir(copy / "checkpoints") == ["2"]
    assert all(np.isfinite(leaf).all() for leaf in read_params(copy, 2).values())
    done = run("train", f"--config={config_file}", f"--workdir={copy}")
    assert done.returncode == 0 and "resuming from step 2 of" in done.stderr, done.stderr
    for name, leaf in read_params(trained, 12).items():
        np.testing.assert_array_equal(read_params(copy, 12)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_evaluate_gives_the_final_metrics_of_training(run, trained, tmp_path):
    workdir = tmp_path / "elsewhere" / "moved"
    shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("eval"))
    done = run("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert metrics == json.loads((trained / "eval" / "test" / "metrics.json").read_text())
    assert metrics["checkpoint_step"] == 12 and metrics["queries"] == 30
    assert "<html" in (workdir / "eval" / "test" / "report.html").read_text()


@pytest.mark.slow
def test_evaluate_can_average_several_views_of_each_picture(run, trained, tmp_path):
    workdir = tmp_path / "moved"
    shutil.copytree(trained, workdir)
    done = run("evaluate", f"--workdir={workdir}", "--config.evaluation.zooms=1,1.2", "--config.evaluation.mirror=true")
    assert done.returncode == 0, done.stderr
    metrics, before = (json.loads((w / "eval" / "test" / "metrics.json").read_text()) for w in (workdir, trained))
    assert (metrics["settings"]["zooms"], metrics["settings"]["mirror"]) == ([1.0, 1.2], True)
    assert (before["settings"]["zooms"], before["settings"]["mirror"]) == ([1.0], False)
    # The stored embeddings are of the unchanged pictures; equal metrics would mean that they were used again.
    assert metrics["text_to_image"] != before["text_to_image"]


@pytest.mark.slow
def test_all_products_of_another_catalogue_can_be_evaluated(run, trained, tmp_path):
    workdir = tmp_path / "moved"
    shutil.copytree(trained, workdir)
    draw_catalogue(tmp_path / "shop", 40, 5)
    arguments = ["--config.data.reader=fashion_product_images", f"--config.data.path={tmp_path / 'shop'}"]
    done = run("evaluate", f"--workdir={workdir}", "--step=best", *arguments, "--config.data.split=all")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "shop-all" / "metrics.json").read_text())
    assert metrics["gallery"] == 40 and metrics["queries"] >= 40
    saved_steps = {int(name) for name in os.listdir(workdir / "checkpoints")}
    assert metrics["checkpoint_step"] in saved_steps
    on_own_catalogue = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert metrics["data_fingerprint"] != on_own_catalogue["data_fingerprint"]
    assert metrics["config_fingerprint"] == on_own_catalogue["config_fingerprint"]
