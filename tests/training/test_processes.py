"""Two processes with four devices each form one run: they give the results of one process, and end together."""

import os
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
    """A function that starts a command as `count` processes of one run; only the second gets `second_arguments`."""
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    settings = {**environment, "XLA_FLAGS": f"{environment['XLA_FLAGS']} {flags}"}

    def start_all(command, *arguments, second_arguments=(), count=2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        run_flags = [f"--coordinator_address=localhost:{port}", f"--num_processes={count}"]
        return [
            subprocess.Popen(
                [sys.executable, "-m", f"jaxclip.{command}", *arguments, *extra, *run_flags, f"--process_id={number}"],
                env=settings,
                cwd=environment["JAXCLIP_CACHE"],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for number, extra in enumerate([(), second_arguments][:count])
        ]

    return start_all


def finish(processes, *, seconds=900):
    """Waits for all processes, kills those that run too long, and returns [(status, output, errors)]."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return sum('"loss"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def wait_for_step(processes, workdir, step):
    while steps_logged(workdir) < step:
        assert all(process.poll() is None for process in processes), finish(processes, seconds=ALL_END_WITHIN)
        time.sleep(0.05)


def assert_equals_run_of_one_process(workdir, trained, read_params, read_rows):
    expected, actual = read_params(trained, LAST), read_params(workdir, LAST)
    assert expected.keys() == actual.keys() and len(expected) > 20
    for name, leaf in expected.items():
        np.testing.assert_allclose(actual[name], leaf, atol=1e-5, err_msg=name)
    losses = [[row["loss"] for row in read_rows(folder) if "loss" in row] for folder in (workdir, trained)]
    assert len(losses[0]) == LAST
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.fixture(scope="module")
def kill_and_resume(start_all, config_file, tmp_path_factory):
    """A function that trains as two processes, kills the second at a random moment, and resumes with `count` processes.

    It returns the workdir, and (status, output, errors) of the first process and of each resumed one.
    """

    def train(count):
        workdir = tmp_path_factory.mktemp("runs") / "killed"
        arguments = ["train", f"--config={config_file}", f"--workdir={workdir}"]
        processes = start_all(*arguments)
        wait_for_step(processes, workdir, random.randint(1, LAST - 4))
        time.sleep(random.random())
        step, began = steps_logged(workdir), time.monotonic()
        processes[1].kill()
        (first,) = finish(processes[:1], seconds=ALL_END_WITHIN)
        # pytest -rP shows the output of tests that pass.
        print(f"killed at step {step}; the other process ended {time.monotonic() - began:.1f} s later")
        finish(processes)
        return workdir, first, finish(start_all(*arguments, count=count))

    return train


@pytest.fixture(scope="module")
def resumed(kill_and_resume):
    return kill_and_resume(2)


def test_when_one_process_is_killed_the_other_reports_it_and_ends_within_a_minute(resumed):
    _, (status, _, errors), _ = resumed
    # The watchdog names the process after 30 seconds; Gloo or JAX's own service may notice earlier.
    assert status != 0 and any(words in errors for words in ("process 1 was killed", "task:1", "Gloo", "gloo")), errors


def test_two_processes_resumed_after_a_kill_end_as_one_does_and_only_the_first_writes(
    resumed, trained, read_params, read_rows
):
    workdir, _, ended = resumed
    assert [status for status, *_ in ended] == [0, 0], ended
    assert_equals_run_of_one_process(workdir, trained, read_params, read_rows)
    event_files = list((workdir / "tensorboard").iterdir())
    assert len(event_files) == 2  # of the first process: one from before the kill, one from after it
    assert "text-to-image" in ended[0][1] and "text-to-image" not in ended[1][1]
    assert "training" in ended[0][2] and "training" not in ended[1][2]


@pytest.mark.parametrize("number", range(int(os.environ.get("JAXCLIP_KILLS", "0"))))
def test_one_or_two_processes_resumed_after_a_kill_end_as_an_uninterrupted_run_does(
    kill_and_resume, trained, read_params, read_rows, number
):
    """JAXCLIP_KILLS sets the number of repetitions; each takes a minute."""
    workdir, (status, *_), ended = kill_and_resume(2 - number % 2)
    assert status != 0 and [status for status, *_ in ended] == [0] * (2 - number % 2), ended
    assert_equals_run_of_one_process(workdir, trained, read_params, read_rows)


def test_two_processes_give_the_metrics_of_one(start_all, run, resumed, tmp_path):
    metrics = []
    for count in (2, 1):
        workdir = tmp_path / f"{count} processes"
        shutil.copytree(resumed[0], workdir)
        shutil.rmtree(workdir / "eval")
        shutil.rmtree(workdir / "embeddings", ignore_errors=True)
        ended = finish(start_all("evaluate", f"--workdir={workdir}", "--config.evaluation.batch_size=16", count=count))
        assert [status for status, *_ in ended] == [0] * count, ended
        metrics.append((workdir / "eval" / "test" / "metrics.json").read_text())
    assert metrics[0] == metrics[1]


def test_when_one_process_fails_the_other_names_it_and_the_reason_and_ends_within_a_minute(
    start_all, config_file, tmp_path
):
    workdir = tmp_path / "failing"
    processes = start_all(
        "train", f"--config={config_file}", f"--workdir={workdir}", second_arguments=["--profile_steps=9"]
    )
    _, out, errors = finish(processes[1:])[0]
    began = time.monotonic()
    ((status, _, first_errors),) = finish(processes[:1], seconds=ALL_END_WITHIN)
    print(f"the other process ended {time.monotonic() - began:.1f} s later")
    reason = "--profile_steps=9 must be FIRST:LAST"
    assert reason in errors and processes[1].returncode == 2
    assert status == 1 and "process 1 on " in first_errors and reason in first_errors, first_errors
    assert not workdir.exists()


def test_processes_with_different_configurations_are_refused(start_all, config_file, tmp_path):
    workdir = tmp_path / "differing"
    other = ["--config.optimizer.learning_rate=0.5"]
    ended = finish(start_all("train", f"--config={config_file}", f"--workdir={workdir}", second_arguments=other))
    for status, _, errors in ended:
        assert status != 0 and "process 1" in errors and "optimizer.learning_rate = 0.5, not 0.001" in errors, errors
    assert not workdir.exists()


def test_sigterm_to_one_process_saves_and_ends_both_and_one_process_resumes(
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
    assert_equals_run_of_one_process(workdir, trained, read_params, read_rows)
