"""Runs on several catalogues with judged queries resume exactly, and report each catalogue (real processes)."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxclip.catalog.drawn import draw_catalogue

pytestmark = pytest.mark.slow
LAST, DEVICES = 12, 4
WEIGHTS = (3.0, 1.0)


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """Two drawn catalogues of 60 and 40 products, and a file with a query of every product."""
    root = tmp_path_factory.mktemp("shops")
    lines = ["query,product,grade,split"]
    for name, products, seed in (("ours", 60, 1), ("theirs", 40, 2)):
        draw_catalogue(root / name, products, seed)
        ids = [row.split(",")[0] for row in (root / name / "styles.csv").read_text().splitlines()[1:]]
        lines += [f"{name} {number % 7},{id_},{1 + number % 3},train" for number, id_ in enumerate(ids)]
        lines += [f"{name} {number % 5},{id_},{1 + number % 2},test" for number, id_ in enumerate(ids)]
    (root / "judged.csv").write_text("\n".join(lines))
    return root


def flags(shops, weights=WEIGHTS, queries=0.5):
    sources = tuple(
        ("fashion_product_images", str(shops / name), weight)
        for name, weight in zip(("ours", "theirs"), weights, strict=True)
    )
    return [
        f"--config.data.sources={sources}",
        f"--config.data.queries={shops / 'judged.csv'}",
        f"--config.augmentation.queries={queries}",
        "--config.checkpoint.keep=20",
    ]


@pytest.fixture(scope="module")
def train(environment, config_file):
    """A function that starts a run with a number of devices; the step at which it is killed may be given."""

    def train(workdir, arguments, *, devices=1, kill_at=0):
        devices_flag = f"{environment['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxclip.train", f"--config={config_file}", f"--workdir={workdir}", *arguments],
            env={**environment, "XLA_FLAGS": devices_flag},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        while kill_at and process.poll() is None and steps_logged(workdir) < kill_at:
            time.sleep(0.02)
        if kill_at:
            time.sleep(random.random() / 2)
            process.send_signal(signal.SIGKILL)
        out, errors = process.communicate(timeout=1800)
        assert kill_at or process.returncode == 0, errors
        return out, errors

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, shops, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(workdir, flags(shops))
    return workdir


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def losses(workdir, read_rows):
    return [row["loss"] for row in read_rows(workdir) if "loss" in row]


def assert_equal_to_the_bit(workdir, other, read_params, read_rows):
    expected, actual = read_params(other, LAST), read_params(workdir, LAST)
    assert expected.keys() == actual.keys() and len(expected) > 20
    for name, leaf in expected.items():
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    assert losses(workdir, read_rows) == losses(other, read_rows)


def test_a_run_killed_at_random_and_resumed_on_other_devices_equals_an_uninterrupted_one_to_the_bit(
    train, shops, uninterrupted, tmp_path, read_params, read_rows
):
    """Devices add in another order, so the run to compare with changes devices at the same step, but without a kill."""
    killed, stopped = tmp_path / "killed", tmp_path / "stopped"
    train(killed, flags(shops), kill_at=random.randint(3, LAST - 3))
    copies = {devices: tmp_path / f"{devices} devices" for devices in (1, DEVICES)}
    for devices, workdir in copies.items():
        shutil.copytree(killed, workdir)
        _, errors = train(workdir, flags(shops), devices=devices)
        step = int(errors.partition("resuming from step ")[2].split()[0])
    assert_equal_to_the_bit(copies[1], uninterrupted, read_params, read_rows)
    shutil.copytree(uninterrupted, stopped)
    for folder in (stopped / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    train(stopped, flags(shops), devices=DEVICES)
    assert_equal_to_the_bit(copies[DEVICES], stopped, read_params, read_rows)
    np.testing.assert_allclose(losses(stopped, read_rows), losses(uninterrupted, read_rows), rtol=1e-5)


def test_queries_and_weights_change_the_run_and_cannot_be_changed_when_it_is_resumed(
    run, train, config_file, shops, uninterrupted, tmp_path, read_rows
):
    train(tmp_path / "captions", flags(shops, queries=0.0))
    train(tmp_path / "weights", flags(shops, weights=(1.0, 1.0)))
    first = [losses(folder, read_rows)[0] for folder in (uninterrupted, tmp_path / "captions", tmp_path / "weights")]
    assert len(set(first)) == 3
    for changed in (flags(shops, weights=(1.0, 1.0)), flags(shops, queries=0.4)):
        done = run("train", f"--config={config_file}", f"--workdir={uninterrupted}", *changed)
        assert done.returncode == 2 and "was started with another configuration" in done.stderr, done.stderr
        assert "data.sources" in done.stderr or "augmentation.queries" in done.stderr


def test_judged_queries_are_evaluated_and_each_catalogue_has_the_figures_it_has_alone(
    run, shops, uninterrupted, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    judged = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())["judged"]
    assert judged["queries"] > 0 and 0 < judged["ndcg@10"]["value"] <= 1
    done = run("evaluate", f"--workdir={workdir}", "--config.data.split=all")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "all" / "metrics.json").read_text())
    assert metrics["sources"].keys() == {"ours", "theirs"}
    for name, size in (("ours", 60), ("theirs", 40)):
        assert f"text-to-image, {name}" in done.stdout
        alone = ["--config.data.sources=()", "--config.data.reader=fashion_product_images"]
        alone += [f"--config.data.path={shops / name}", "--config.data.split=all", "--config.data.queries="]
        done_alone = run("evaluate", f"--workdir={workdir}", *alone)
        assert done_alone.returncode == 0, done_alone.stderr
        expected = json.loads((workdir / "eval" / f"{name}-all" / "metrics.json").read_text())
        own = metrics["sources"][name]
        assert own["queries"] == own["gallery"] == size
        for direction in ("text_to_image", "image_to_text"):
            for protocol, found in ((expected, own), (expected["pairs"], own["pairs"])):
                for figure, value in protocol[direction].items():
                    # The catalogues alone have another order, and so other intervals.
                    assert found[direction][figure]["value"] == pytest.approx(value["value"]), (name, figure)
    values = [metrics["sources"][name]["text_to_image"]["hit@5"]["value"] for name in ("ours", "theirs")]
    assert metrics["mean_of_sources"]["text_to_image"]["hit@5"] == pytest.approx(np.mean(values))
