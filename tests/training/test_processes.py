"""Two processes with four devices each are one run: they end where one does, and end together (real processes)."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow
LAST, DEVICES = 12, 4
ALL_END_WITHIN = 60  # seconds


@pytest.fixture(scope="module")
def start_all(environment):
    """Starts a command of jaxclip as two processes of one run; `own` are arguments of the second alone."""
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # A program at a time: with more devices than cores two can wait for each other's threads.
    settings = {"XLA_FLAGS": f"{environment['XLA_FLAGS']} {flags}", "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}

    def start_all(command, *arguments, own=()):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        place = [f"--coordinator_address=localhost:{port}", "--num_processes=2"]
        return [
            subprocess.Popen(
                [sys.executable, "-m", f"jaxclip.{command}", *arguments, *extra, *place, f"--process_id={number}"],
                env={**environment, **settings},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number, extra in enumerate([(), own])
        ]

    return start_all


def finish(processes, *, seconds=900):
    """Returns [(status, output, errors)] of all processes at their end; none outlives its test."""
    deadline = time.monotonic() + seconds
    try:
        ended = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, ended, strict=True)]


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def wait_for_step(processes, workdir, step):
    while steps_logged(workdir) < step:
        assert all(process.poll() is None for process in processes), finish(processes, seconds=ALL_END_WITHIN)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def together(start_all, config_file, trained, tmp_path_factory):
    """The workdir of a run of two processes that nothing interrupted, and how they ended."""
    workdir = tmp_path_factory.mktemp("runs") / "together"
    return workdir, finish(start_all("train", f"--config={config_file}", f"--workdir={workdir}"))


def test_two_processes_end_where_one_does_and_write_once(together, trained, read_params, read_rows):
    workdir, ended = together
    assert [status for status, *_ in ended] == [0, 0], ended
    expected, found = read_params(trained, LAST), read_params(workdir, LAST)
    assert expected.keys() == found.keys() and len(expected) > 20
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-5, err_msg=name)
    rows = [[row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (workdir, trained)]
    assert len(rows[0]) == LAST
    np.testing.assert_allclose(*rows, rtol=1e-5)
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert "text-to-image" in ended[0][1] and "text-to-image" not in ended[1][1]
    assert "training" in ended[0][2] and "training" not in ended[1][2]


def test_two_processes_evaluate_as_one(start_all, together, trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(together[0], workdir)
    shutil.rmtree(workdir / "eval")
    ended = finish(start_all("evaluate", f"--workdir={workdir}", "--config.evaluation.batch_size=16"))
    assert [status for status, *_ in ended] == [0, 0], ended
    found, expected = (json.loads((folder / "eval/test/metrics.json").read_text()) for folder in (workdir, trained))
    assert found["text_to_image"] == expected["text_to_image"] and found["image_to_text"] == expected["image_to_text"]


def test_processes_with_different_configurations_are_told_so(start_all, config_file, tmp_path):
    workdir = tmp_path / "differing"
    other = ["--config.optimizer.learning_rate=0.5"]
    began = time.monotonic()
    ended = finish(start_all("train", f"--config={config_file}", f"--workdir={workdir}", own=other))
    assert time.monotonic() - began < 2 * ALL_END_WITHIN
    for status, _, errors in ended:
        assert status != 0 and "process 1" in errors and "optimizer.learning_rate = 0.5, not 0.001" in errors, errors
    assert not workdir.exists()


def test_sigterm_to_one_process_saves_and_ends_both_and_one_process_goes_on(
    start_all, run, config_file, trained, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "stopped"
    arguments = ["train", f"--config={config_file}", f"--workdir={workdir}", "--config.checkpoint.every=100"]
    processes = start_all(*arguments)
    wait_for_step(processes, workdir, 2)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [status for status, *_ in ended] == [0, 0], ended
    step = steps_logged(workdir)
    assert 2 <= step < LAST and f"stopped by SIGTERM at step {step}, saved" in ended[0][1]
    done = run(*arguments)
    assert done.returncode == 0 and f"resuming from step {step} of" in done.stderr, done.stderr
    for name, leaf in read_params(trained, LAST).items():
        np.testing.assert_allclose(read_params(workdir, LAST)[name], leaf, atol=1e-5, err_msg=name)
    losses = [[row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (workdir, trained)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_after_a_kill_of_one_process_the_other_ends_in_time_and_the_next_run_ends_bit_identical(
    start_all, config_file, together, tmp_path, read_params, read_rows
):
    workdir = tmp_path / "killed"
    arguments = ["train", f"--config={config_file}", f"--workdir={workdir}"]
    processes = start_all(*arguments)
    wait_for_step(processes, workdir, 5)
    time.sleep(random.random())
    processes[1].kill()
    (other,) = finish([processes[0]], seconds=ALL_END_WITHIN)
    finish(processes)
    # The watch names the process after 30 seconds; Gloo or JAX's own service may notice before.
    assert other[0] != 0 and any(words in other[2] for words in ("process 1 was killed", "task:1", "Gloo", "gloo")), (
        other
    )
    ended = finish(start_all(*arguments))
    assert [status for status, *_ in ended] == [0, 0], ended
    for name, leaf in read_params(together[0], LAST).items():
        np.testing.assert_array_equal(read_params(workdir, LAST)[name], leaf, err_msg=name)
    assert read_rows(workdir) == read_rows(together[0])
