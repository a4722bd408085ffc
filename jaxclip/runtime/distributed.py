"""Several processes in one run: they find each other, exchange values, and end together.

All of this uses the key-value store of JAX's coordination service, which runs in process 0 and needs no devices.
Functions that wait for other processes must be called by all of them, from their main threads and in the same order.
In a run of one process no function waits.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TextIO

import jax
from jax._src import cloud_tpu_init
from jax._src import distributed as jax_distributed  # the store has no public name; Orbax also imports it from here

from jaxclip.errors import UserError, first_line

HEARTBEAT, LOST_AFTER = 2.0, 30.0
"""Seconds between two heartbeats, and seconds without one after which a process is considered lost."""
DAY = 24 * 3600 * 1000  # ms; long because process 0 may be preparing a catalogue. Heartbeats detect failures
FAILED, ALIVE = "jaxclip/failed", "jaxclip/alive"
"""Folders of the key-value store: the reason of a failure, and the last heartbeat of each process."""
PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the run that the arguments describe or, without arguments, SLURM, GKE or Cloud TPU.

    If none of these describes a run, this process is the only one. Call this before anything is computed.

    Raises:
      UserError: only some of the arguments are given, `process_id` is out of range, or process 0 cannot be reached.
    """
    flags = dict(zip(PROCESS_FLAGS, (coordinator_address, num_processes, process_id), strict=True))
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        if not _in_cluster():
            return
        arguments: dict[str, Any] = {}
    elif missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {verb} missing: set all of --{', --'.join(PROCESS_FLAGS)}, or none")
    elif not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id} must be from 0 to {num_processes - 1}, below --num_processes")
    else:
        arguments = {**flags, "cluster_detection_method": "deactivate"}
    # `training.stopping` replaces this service: Orbax would ask it about older steps, and a process could miss a stop.
    jax.config.update("jax_enable_preemption_service", False)
    # Two programs that run at once on CPU devices could each hold the threads that the other's collectives need.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"could not join the run's other processes: {first_line(error)}; check that all processes have started"
        ) from error
    # A file descriptor of its own, since `startup.quiet_imports` hides what is written to sys.stderr.
    errors = os.fdopen(os.dup(sys.stderr.fileno()), "w")
    threading.Thread(target=_watch, args=(errors,), daemon=True, name="watch").start()


def _in_cluster() -> bool:
    """Returns whether this process is one of several, or may be because it runs on a Cloud TPU host."""
    slurm = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    gke = any("," in os.environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
    configured = {"TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"} & os.environ.keys()
    return slurm or gke or slices or (cloud_tpu_init.running_in_cloud_tpu_vm and not configured)


def process_id() -> int:
    """Returns the index of this process without starting a JAX back end, which jax.process_index() would do."""
    return jax_distributed.global_state.process_id or 0


def process_count() -> int:
    """Returns the number of processes of the run without starting a JAX back end."""
    return 1 if store() is None else jax_distributed.global_state.num_processes


def require_one_process(task: str) -> None:
    """Raises a UserError that names the task if the run has several processes."""
    if process_count() > 1:
        raise UserError(
            f"{task} must run as one process, which uses all devices of its machine, but there are {process_count()}: "
            "start only one"
        )


def is_primary() -> bool:
    """Returns whether this is process 0, which alone prints results and writes all of a workdir except checkpoints."""
    return process_id() == 0


def store() -> Any:
    """Returns the key-value store that all processes share; None if this process has not joined others."""
    return jax_distributed.global_state.client


def broadcast(name: str, make: Callable[[], Any]) -> Any:
    """Returns the result of make(), a JSON value, on every process; only process 0 calls it, the others wait."""
    shared = store()
    if shared is None:
        return make()
    key = _key("broadcast", name)
    if is_primary():
        shared.key_value_set(key, json.dumps(make()))
    return json.loads(shared.blocking_key_value_get(key, DAY))


def check_identical(name: str, facts: Mapping[str, Any], remedy: str) -> None:
    """Waits for all processes and checks that they have the same facts.

    Raises:
      UserError: on every process; it names a process whose facts differ from those of process 0, the facts and the
        remedy.
    """
    shared = store()
    if shared is None:
        return
    key = _key("identical", name)
    shared.key_value_set(f"{key}/{process_id()}", json.dumps([socket.gethostname(), facts]))

    def compare() -> str:
        answers = [json.loads(shared.blocking_key_value_get(f"{key}/{i}", DAY)) for i in range(process_count())]
        reference = answers[0][1]
        for number, (host, other) in enumerate(answers):
            differing = [f"{fact} = {other.get(fact)!r}, not {reference.get(fact)!r}" for fact in reference | other
                         if other.get(fact) != reference.get(fact)]  # fmt: skip
            if differing:
                return f"process {number} on {host} differs from process 0: {'; '.join(differing)}. {remedy}"
        return ""

    if difference := broadcast(name, compare):
        raise UserError(difference)


def barrier(name: str) -> None:
    """Waits until all processes have reached this barrier."""
    if store() is not None:
        store().wait_at_barrier(_key("barrier", name), DAY)


def _key(kind: str, name: str) -> str:
    """Returns a new key that is equal on all processes, since they make their calls in the same order."""
    return f"jaxclip/{kind}/{next(_keys)}/{name}"


def leave() -> None:
    """Waits for all processes and then leaves the run."""
    if store() is not None:
        barrier("leave")
        _left.set()
        jax.distributed.shutdown()


def fail(error: BaseException, sentence: str, status: int) -> NoReturn:
    """Prints the sentence and ends this process with the exit status; the other processes print it and end too.

    After an error from a JAX program it first waits over 30 seconds: usually a collective failed because another
    process died, and then the watchdog names that process and ends this one.
    """
    chain = [error, error.__cause__, error.__context__]
    if any(isinstance(link, jax.errors.JaxRuntimeError) for link in chain):
        time.sleep(LOST_AFTER + 3 * HEARTBEAT)
    print(sentence, file=sys.stderr, flush=True)
    _report(f"process {process_id()} on {socket.gethostname()} failed: {sentence}")
    # Process 0 runs the store, so it must stay until the others have seen the failure.
    time.sleep(2 * HEARTBEAT if is_primary() else 0)
    _exit(status)


_left = threading.Event()
_keys = itertools.count()


def _watch(errors: TextIO) -> None:
    """Sends heartbeats, and ends this process when another has failed; process 0 also detects lost processes."""
    shared, seen = store(), {}
    for beat in itertools.count():
        try:
            shared.key_value_set(f"{ALIVE}/{process_id()}", str(beat), allow_overwrite=True)
            failure = dict(shared.key_value_dir_get(FAILED)).get(f"{FAILED}/reason")
            if failure is None and is_primary() and (failure := _lost(dict(shared.key_value_dir_get(ALIVE)), seen)):
                _report(failure)
                time.sleep(2 * HEARTBEAT)
        except jax.errors.JaxRuntimeError:
            failure = "process 0 exited without reporting an error"
        if _left.is_set():
            return
        if failure:
            print(f"error: {failure}; all processes end. The same command resumes training from the newest checkpoint",
                  file=errors, flush=True)  # fmt: skip
            _exit(1)
        if _left.wait(HEARTBEAT):
            return


def _lost(alive: Mapping[str, str], seen: dict[str, tuple[str, float]]) -> str | None:
    """Returns an error that names the processes without a recent heartbeat, or None; updates `seen`.

    `seen`: name -> the last heartbeat and the time when it was first seen.
    """
    now = time.monotonic()
    for name, beat in alive.items():
        if name not in seen or seen[name][0] != beat:
            seen[name] = beat, now
    lost = [name.rsplit("/", 1)[-1] for name, (_, last) in seen.items() if now - last > LOST_AFTER]
    return f"process {', '.join(lost)} was killed or cannot be reached" if lost else None


def _report(failure: str) -> None:
    try:
        store().key_value_set(f"{FAILED}/reason", failure)
    except jax.errors.JaxRuntimeError:
        return  # another process has already reported one, or the store is gone; both end all processes


def _exit(status: int) -> NoReturn:
    """Exits immediately; an ordinary exit would wait minutes for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
