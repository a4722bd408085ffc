"""A single process joins no others, incomplete flags are refused, schedulers recognised, and lost processes named."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxclip.errors import UserError
from jaxclip.runtime import distributed

JOINING = """
from jaxclip.runtime import distributed

distributed.join(None, None, None)
agreed = distributed.broadcast("who", distributed.process_id)
print(distributed.process_id(), distributed.process_count(), agreed)
distributed.leave()
"""


@pytest.fixture
def no_scheduler(monkeypatch):
    """Removes the variables of schedulers from the environment; returns `monkeypatch`."""
    for name in (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "TPU_WORKER_HOSTNAMES",
        "TPU_PROCESS_ADDRESSES",
        "MEGASCALE_NUM_SLICES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.cloud_tpu_init, "running_in_cloud_tpu_vm", False)
    return monkeypatch


def test_a_single_process_joins_no_others_and_agrees_with_itself(no_scheduler):
    distributed.join(None, None, None)
    assert distributed.store() is None and distributed.is_primary() and distributed.process_count() == 1
    assert distributed.broadcast("value", lambda: "made") == "made"
    distributed.check_identical("facts", {"seed": 1}, "")
    distributed.leave()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id are missing"),
        (("localhost:1", 2, None), "--process_id is missing"),
        ((None, 2, 0), "--coordinator_address is missing"),
        (("localhost:1", 2, 2), "--process_id=2 must be from 0 to 1"),
    ],
)
def test_incomplete_or_wrong_process_flags_are_refused(no_scheduler, flags, words):
    with pytest.raises(UserError, match=words):
        distributed.join(*flags)


@pytest.mark.parametrize(
    ("variables", "one_of_several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # in an allocation, but not started by srun
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_schedulers_are_recognised_by_their_variables(no_scheduler, variables, one_of_several):
    for name, value in variables.items():
        no_scheduler.setenv(name, value)
    assert distributed._in_cluster() == one_of_several


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda number: {
            "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "SLURM_PROCID": number, "SLURM_LOCALID": number,
        },
        lambda number: {
            "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1", "TPU_WORKER_ID": number, "JAX_FORCE_TPU_INIT": "1",
            "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0",
        },
    ],
    ids=["SLURM", "GKE"],
)  # fmt: skip
def test_two_processes_find_each_other_from_the_schedulers_variables(no_scheduler, scheduler):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = {"JAX_COORDINATOR_PORT": str(free.getsockname()[1]), "PYTHONPATH": str(Path(__file__).parents[2])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINING],
            env={**os.environ, **port, **scheduler(str(number))},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [out.split() for out, _ in ended] == [["0", "2", "0"], ["1", "2", "0"]], ended


def test_a_process_without_heartbeats_is_named(no_scheduler):
    now = 100.0
    no_scheduler.setattr(distributed.time, "monotonic", lambda: now)
    seen = {}
    assert distributed._lost({"alive/0": "1", "alive/1": "1"}, seen) is None
    now += distributed.LOST_AFTER / 2
    assert distributed._lost({"alive/0": "2", "alive/1": "1"}, seen) is None
    now += distributed.LOST_AFTER / 2 + 1
    assert distributed._lost({"alive/0": "3", "alive/1": "1"}, seen) == "process 1 was killed or cannot be reached"
