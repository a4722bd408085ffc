"""`evaluate --compare` and `evaluate --query` run as processes, and their pages open in a browser."""

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxclip import config
from jaxclip.evaluation import comparison
from jaxclip.evaluation.metrics_file import load_if_current, read

PHONE, DESKTOP = 400, 1400


@pytest.fixture(scope="module")
def two(trained, tmp_path_factory):
    """Two copies of a run; the second ends two steps earlier and has not been evaluated."""
    folder = tmp_path_factory.mktemp("two")
    first, second = folder / "first", folder / "second"
    shutil.copytree(trained, first)
    shutil.copytree(trained, second)
    shutil.rmtree(second / "checkpoints" / "12")
    shutil.rmtree(second / "eval")
    return first, second


@pytest.fixture(scope="module")
def compared(two, run):
    done = run("evaluate", "--compare", *map(str, two))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_runs_are_compared_after_evaluating_the_one_that_was_not(two, compared):
    first, second = two
    folder = second / "eval" / "test" / "against-first"
    assert f"evaluating {second} first" in compared.stderr and f"evaluating {first} first" not in compared.stderr
    figures = json.loads((folder / "comparison.json").read_text())
    sides = figures.pop("baseline"), figures.pop("run")
    assert [side["workdir"] for side in sides] == [str(first.resolve()), str(second.resolve())]
    assert [side["step"] for side in sides] == ["12", "10"] and sides[0]["parameters"] == "raw"
    assert sides[0]["data fingerprint"] == sides[1]["data fingerprint"]
    assert figures.keys() == {"text_to_image", "image_to_text"}
    for direction, rows in figures.items():
        for name, row in rows.items():
            old, new = (
                json.loads((run / "eval" / "test" / "metrics.json").read_text())[direction][name]["value"]
                for run in two
            )
            assert (row["baseline"], row["value"]) == pytest.approx((old, new), abs=1e-12)
            assert row["difference"] == pytest.approx(new - old, abs=1e-12)
    assert "text-to-image" in compared.stdout and "hit@1" in compared.stdout
    assert str(folder / "report.html") in compared.stdout


@pytest.mark.slow
def test_the_page_of_a_comparison_opens_on_a_phone_and_on_a_desktop(two, compared, open_page):
    report = two[1] / "eval" / "test" / "against-first" / "report.html"
    for width in (PHONE, DESKTOP):
        for scheme in ("light", "dark"):
            page = open_page(report, width, scheme)
            assert page.locator("img").count() > 50
    assert "first" in page.locator("body").inner_text()


@pytest.mark.slow
def test_the_same_evaluations_are_compared_again_without_evaluating(two, compared, run):
    started = time.time()
    done = run("evaluate", "--compare", *map(str, two))
    assert done.returncode == 0, done.stderr
    assert done.stdout == compared.stdout and "evaluating" not in done.stderr
    assert all((folder / "eval" / "test" / "queries.npz").stat().st_mtime < started for folder in two)


@pytest.mark.slow
def test_sentences_are_searched_in_a_gallery_without_captions(two, run, tmp_path, open_page):
    random = np.random.default_rng(0)
    for n in range(14):
        pixels = random.integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n:02}.png")
    workdirs = ",".join(map(str, two))
    data = ["--config.data.reader=folder", f"--config.data.path={tmp_path}", "--config.data.split=all"]
    done = run("evaluate", f"--workdir={workdirs}", "--query=red <b>shoes</b>", "--query=a blue dress", *data)
    assert done.returncode == 0, done.stderr
    sheet = two[0] / "eval" / "queries" / "sheet.html"
    assert str(sheet) in done.stdout
    for width in (PHONE, DESKTOP):
        page = open_page(sheet, width)
        assert page.locator("img").count() == 2 * 2 * 10
        text = page.locator("body").inner_text()
        assert "red <b>shoes</b>" in text and "first" in text and "second" in text
        assert "config fingerprint" in text.lower() and config.fingerprint(config.load_config(two[1])) in text


@pytest.mark.slow
def test_runs_on_different_catalogues_are_refused_before_either_is_evaluated(two, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(two[1], other, ignore=shutil.ignore_patterns("eval"))
    settings = json.loads((other / "config.json").read_text())
    settings["data"]["drawn_seed"] = 3
    (other / "config.json").write_text(json.dumps(settings))
    done = run("evaluate", "--compare", str(two[1]), str(other))
    assert done.returncode == 2 and "rank different products" in done.stderr, done.stderr
    assert not (other / "eval").exists() and "evaluating" not in done.stderr


@pytest.mark.slow
def test_the_report_of_a_run_evaluated_for_a_comparison_shows_its_command(two, run, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in two]
    done = run("evaluate", "--compare", *map(str, copies), "--config.evaluation.mirror=true", "--name=mirrored")
    assert done.returncode == 0, done.stderr
    for folder, step in zip(copies, (12, 10), strict=True):
        page = (folder / "eval" / "mirrored" / "report.html").read_text()
        ours = f"--workdir={folder} --config.evaluation.mirror=true --name=mirrored --step={step} --parameters=raw"
        assert f"python -m jaxclip.evaluate {ours}" in page


@pytest.mark.slow
def test_stored_metrics_are_reused_only_if_they_would_be_the_same_again(trained):
    own, folder = config.load_config(trained), trained / "eval" / "test"
    data = read(folder)["data_fingerprint"]
    assert load_if_current(own, trained, "latest", folder, data) == read(folder)
    views = replace(own, evaluation=replace(own.evaluation, zooms=(1.0, 1.2)))
    train = replace(own, data=replace(own.data, split="train"))
    others = ((views, "latest", data), (train, "latest", data), (own, "10", data), (own, "latest", "another"))
    for configured, step, fingerprint in others:
        assert load_if_current(configured, trained, step, folder, fingerprint) is None
    assert load_if_current(own, trained, "latest", trained / "eval" / "never", data) is None


def test_baselines_of_the_same_name_have_separate_folders(tmp_path):
    evaluated, here, there = tmp_path / "eval", tmp_path / "a" / "run", tmp_path / "b" / "run"
    folder = comparison._folder(evaluated, here)
    assert folder == evaluated / "against-run"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"baseline": {"workdir": str(here)}}))
    assert comparison._folder(evaluated, here) == folder != comparison._folder(evaluated, there)
    assert comparison._names([here, there]) == ["a/run", "b/run"]
    assert comparison._names([here, tmp_path / "b" / "other"]) == ["run", "other"]
    assert comparison._names([here, here]) == ["run", "run"]


def test_contradictory_flags_are_reported(run, trained):
    for arguments, words in (
        (["--compare", str(trained)], "--compare takes two workdirs"),
        (["--compare", str(trained), str(trained), "--query=shoes"], "no --workdir, --query"),
        ([f"--workdir={trained},{trained}"], "--compare W1 W2 compares two"),
    ):
        done = run("evaluate", *arguments)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
