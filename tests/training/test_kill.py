"""A run that is killed, stopped or started again ends as an uninterrupted one does (real processes)."""

import json
import shutil
import signal
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
LAST = 12


def logged_step(workdir):
    """Returns the last step in metrics.jsonl; a line that is still being written does not count."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def unfinished_save(workdir):
    return next((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"), None)


def end_when(process, condition, number):
    """Sends a signal as soon as condition() is true; returns whether the process was still running then."""
    while process.poll() is None:
        if condition():
            process.send_signal(number)
            return True
        time.sleep(0.0005)
    return False


def assert_same_run(workdir, trained, read_params, read_rows):
    expected, actual = read_params(trained, LAST), read_params(workdir, LAST)
    assert expected.keys() == actual.keys() and len(expected) > 20
    for name, leaf in expected.items():
        np.testing.assert_array_equal(actual[name], leaf, err_msg=name)
    assert read_rows(workdir) == read_rows(trained)


def test_a_run_killed_three_times_ends_bit_identical_to_an_uninterrupted_one(
    start, run, config_file, trained, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "killed"
    arguments = ["train", f"--config={config_file}", f"--workdir={workdir}"]

    process = start(*arguments)
    assert end_when(process, lambda: logged_step(workdir) >= 3, signal.SIGKILL)
    process.communicate()

    for _ in range(5):
        process = start(*arguments)
        killed = end_when(process, lambda: unfinished_save(workdir), signal.SIGKILL)
        process.communicate()
        if killed and unfinished_save(workdir):
            break
        if logged_step(workdir) > 8:
            shutil.rmtree(workdir)
    assert unfinished_save(workdir), "no kill interrupted the write of a checkpoint"

    process = start(*arguments)
    before = logged_step(workdir)
    assert end_when(process, lambda: logged_step(workdir) >= max(8, before + 1), signal.SIGKILL)
    process.communicate()

    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert not unfinished_save(workdir)
    assert_same_run(workdir, trained, read_params, read_rows)


def test_sigterm_saves_and_exits_with_0_and_the_next_run_resumes_from_that_step(
    start, run, config_file, trained, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "stopped"
    arguments = ["train", f"--config={config_file}", f"--workdir={workdir}", "--config.checkpoint.every=100"]
    process = start(*arguments)
    assert end_when(process, lambda: logged_step(workdir) >= 2, signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert "Traceback" not in error
    step = logged_step(workdir)
    assert 2 <= step < LAST and f"stopped by SIGTERM at step {step}, saved" in out
    assert (workdir / "checkpoints" / str(step)).is_dir()
    done = run(*arguments)
    assert done.returncode == 0 and f"resuming from step {step} of" in done.stderr, done.stderr
    actual, expected = read_rows(workdir), read_rows(trained)
    assert [row for row in actual if "loss" in row] == [row for row in expected if "loss" in row]
    for name, leaf in read_params(trained, LAST).items():
        np.testing.assert_array_equal(read_params(workdir, LAST)[name], leaf, err_msg=name)


def test_a_finished_run_started_again_trains_no_further_and_gives_the_same_metrics(
    run, config_file, trained, tmp_path, read_params
):
    workdir = tmp_path / "finished"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "eval")
    rows = (workdir / "metrics.jsonl").read_bytes()
    done = run("train", f"--config={config_file}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "compiling" not in done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == rows
    metrics = json.loads((workdir / "eval" / "test" / "metrics.json").read_text())
    assert metrics == json.loads((trained / "eval" / "test" / "metrics.json").read_text())


def test_a_run_whose_newest_checkpoint_is_corrupt_resumes_from_the_one_before(
    run, config_file, trained, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "corrupt"
    shutil.copytree(trained, workdir)
    newest = workdir / "checkpoints" / str(LAST) / "params"
    data = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    done = run("train", f"--config={config_file}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{LAST} is corrupt" in done.stderr and "Traceback" not in done.stderr
    assert "resuming from step 10 of" in done.stderr
    assert_same_run(workdir, trained, read_params, read_rows)
