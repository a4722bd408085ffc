"""The commands `evaluate --compare` and `evaluate --query`, run as processes, and their pages in a browser."""

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

PHONE, DESKTOP = 400, 1400  # widths of the browser's window, in pixels


@pytest.fixture(scope="module")
def two_runs(trained, tmp_path_factory):
    """Two copies of a run; the second ends two steps earlier and has not been evaluated."""
    folder = tmp_path_factory.mktemp("two_runs")
    first, second = folder / "first", folder / "second"
    shutil.copytree(trained, first)
    shutil.copytree(trained, second)
    shutil.rmtree(second / "checkpoints" / "12")
    shutil.rmtree(second / "eval")
    return first, second


@pytest.fixture(scope="module")
def compared(two_runs, run):
    """The finished process of `evaluate --compare` over the two runs."""
    done = run("evaluate", "--compare", *map(str, two_runs))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_comparison_evaluates_only_the_run_without_stored_metrics(two_runs, compared):
    first, second = two_runs
    folder = second / "eval" / "test" / "against-first"
    assert f"evaluating {second} first" in compared.stderr and f"evaluating {first} first" not in compared.stderr
    figures = json.loads((folder / "comparison.json").read_text())
    sides = figures.pop("baseline"), figures.pop("run")
    assert [side["workdir"] for side in sides] == [str(first.resolve()), str(second.resolve())]
    assert [side["step"] for side in sides] == ["12", "10"] and sides[0]["parameters"] == "raw"
    assert sides[0]["data fingerprint"] == sides[1]["data fingerprint"]
    assert figures.pop("notes") == [] and figures.pop("queries") == figures.pop("gallery") == 30
    assert figures.keys() == {"text_to_image", "image_to_text"}
    for direction, rows in figures.items():
        for name, row in rows.items():
            old, new = (
                json.loads((run / "eval" / "test" / "metrics.json").read_text())[direction][name]["value"]
                for run in two_runs
            )
            assert (row["baseline"], row["value"]) == pytest.approx((old, new), abs=1e-12)
            assert row["difference"] == pytest.approx(new - old, abs=1e-12)
    assert "text to image, groups" in compared.stdout and "hit@1" in compared.stdout
    assert str(folder / "report.html") in compared.stdout


@pytest.mark.slow
def test_the_comparison_page_opens_on_a_phone_and_on_a_desktop(two_runs, compared, open_page):
    report = two_runs[1] / "eval" / "test" / "against-first" / "report.html"
    for width in (PHONE, DESKTOP):
        for scheme in ("light", "dark"):
            page = open_page(report, width, scheme)
            assert page.locator("img").count() > 50
    assert "first" in page.locator("body").inner_text()


@pytest.mark.slow
def test_a_repeated_comparison_evaluates_nothing(two_runs, compared, run):
    started = time.time()
    done = run("evaluate", "--compare", *map(str, two_runs))
    assert done.returncode == 0, done.stderr
    assert done.stdout == compared.stdout and "evaluating" not in done.stderr
    assert all((folder / "eval" / "test" / "queries.npz").stat().st_mtime < started for folder in two_runs)


@pytest.mark.slow
def test_query_searches_a_gallery_without_captions(two_runs, run, tmp_path, open_page):
    random = np.random.default_rng(0)
    for number in range(14):
        pixels = random.integers(0, 255, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    workdirs = ",".join(map(str, two_runs))
    gallery = ["--config.data.reader=folder", f"--config.data.path={tmp_path}", "--config.data.split=all"]
    done = run("evaluate", f"--workdir={workdirs}", "--query=red <b>shoes</b>", "--query=a blue dress", *gallery)
    assert done.returncode == 0, done.stderr
    sheet = two_runs[0] / "eval" / "queries" / "sheet.html"
    assert str(sheet) in done.stdout
    for width in (PHONE, DESKTOP):
        page = open_page(sheet, width)
        assert page.locator("img").count() == 2 * 2 * 10
        text = page.locator("body").inner_text()
        assert "red <b>shoes</b>" in text and "first" in text and "second" in text
        assert "config fingerprint" in text.lower() and config.fingerprint(config.load_config(two_runs[1])) in text


@pytest.mark.slow
def test_runs_on_different_catalogues_are_refused_before_any_evaluation(two_runs, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(two_runs[1], other, ignore=shutil.ignore_patterns("eval"))
    settings = json.loads((other / "config.json").read_text())
    settings["data"]["drawn_seed"] = 3
    (other / "config.json").write_text(json.dumps(settings))
    done = run("evaluate", "--compare", str(two_runs[1]), str(other))
    assert done.returncode == 2 and "rank different products" in done.stderr, done.stderr
    assert not (other / "eval").exists() and "evaluating" not in done.stderr


@pytest.mark.slow
def test_the_reports_of_a_comparison_show_the_command_of_each_run(two_runs, run, tmp_path):
    copies = [shutil.copytree(folder, tmp_path / folder.name) for folder in two_runs]
    done = run("evaluate", "--compare", *map(str, copies), "--config.evaluation.mirror=true", "--name=mirrored")
    assert done.returncode == 0, done.stderr
    for folder, step in zip(copies, (12, 10), strict=True):
        page = (folder / "eval" / "mirrored" / "report.html").read_text()
        flags = f"--workdir={folder} --config.evaluation.mirror=true --name=mirrored --step={step} --parameters=raw"
        assert f"python -m jaxclip.evaluate {flags}" in page


@pytest.mark.slow
def test_stored_metrics_are_reused_only_if_checkpoint_settings_and_data_are_unchanged(trained):
    trained_config, folder = config.load_config(trained), trained / "eval" / "test"
    stored = read(folder)
    current = {name: stored[name] for name in ("data_fingerprint", "records_fingerprint")}
    assert load_if_current(trained_config, trained, "latest", folder, **current) == stored
    zoomed = replace(trained_config, evaluation=replace(trained_config.evaluation, zooms=(1.0, 1.2)))
    fewer = replace(trained_config, evaluation=replace(trained_config.evaluation, trial_size=32))
    other_split = replace(trained_config, data=replace(trained_config.data, split="train"))
    for changed, step, fingerprints in (
        (zoomed, "latest", {}),
        (fewer, "latest", {}),
        (other_split, "latest", {}),
        (trained_config, "10", {}),
        (trained_config, "latest", {"data_fingerprint": "another"}),
        (trained_config, "latest", {"records_fingerprint": "another"}),
    ):
        assert load_if_current(changed, trained, step, folder, **current | fingerprints) is None
    assert load_if_current(trained_config, trained, "latest", trained / "eval" / "never", **current) is None


def test_baselines_of_equal_names_get_separate_folders(tmp_path):
    evaluated, here, there = tmp_path / "eval", tmp_path / "a" / "run", tmp_path / "b" / "run"
    folder = comparison._folder(evaluated, here)
    assert folder == evaluated / "against-run"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"baseline": {"workdir": str(here)}}))
    assert comparison._folder(evaluated, here) == folder != comparison._folder(evaluated, there)
    assert comparison._names([here, there]) == ["a/run", "b/run"]
    assert comparison._names([here, tmp_path / "b" / "other"]) == ["run", "other"]
    assert comparison._names([here, here]) == ["run", "run"]


def test_contradictory_flags_are_refused(run, trained):
    for arguments, message in (
        (["--compare", str(trained)], "--compare takes two workdirs"),
        (["--compare", str(trained), str(trained), "--query=shoes"], "no --workdir, --query"),
        ([f"--workdir={trained},{trained}"], "--compare W1 W2 compares two"),
    ):
        done = run("evaluate", *arguments)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
