"""A process alone needs nothing of the others; a process that is told half of its place is told the other half."""

import pytest

from jaxclip.errors import UserError
from jaxclip.training import distributed


@pytest.fixture
def alone(monkeypatch):
    """An environment without a scheduler."""
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


def test_a_process_alone_joins_nobody_and_agrees_with_itself(alone):
    distributed.join(None, None, None)
    assert distributed.store() is None and distributed.is_primary() and distributed.process_count() == 1
    assert distributed.from_primary("value", lambda: "made") == "made"
    distributed.check_identical("facts", {"seed": 1}, "")
    distributed.leave()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("localhost:1", None, None), "--num_processes and --process_id missing"),
        (("localhost:1", 2, None), "--process_id missing"),
        ((None, 2, 0), "--coordinator_address missing"),
        (("localhost:1", 2, 2), "--process_id=2 must be from 0 to 1"),
    ],
)
def test_half_a_place_is_refused(alone, given, words):
    with pytest.raises(UserError, match=words):
        distributed.join(*given)


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
def test_schedulers_are_recognised_by_their_variables(alone, variables, one_of_several):
    for name, value in variables.items():
        alone.setenv(name, value)
    assert distributed._in_cluster() == one_of_several


def test_who_shows_no_sign_of_life_is_named(alone):
    now = 100.0
    alone.setattr(distributed.time, "monotonic", lambda: now)
    seen = {}
    assert distributed._silent({"alive/0": "1", "alive/1": "1"}, seen) is None
    now += distributed.PATIENCE / 2
    assert distributed._silent({"alive/0": "2", "alive/1": "1"}, seen) is None
    now += distributed.PATIENCE / 2 + 1
    assert distributed._silent({"alive/0": "3", "alive/1": "1"}, seen) == "process 1 was killed or cannot be reached"
