"""Runs functions in processes of their own, which are killed with their children at a time limit."""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from jaxclip.errors import first_line
from jaxclip.runtime import startup

Row = dict[str, Any]
PR_SET_PDEATHSIG = 1  # prctl's option, on Linux: the signal that a process gets when its parent dies
LONGEST_ERROR = 400  # characters


def name_of(function: Callable) -> str:
    """Returns "module:function", by which another process finds a function of a module."""
    return f"{function.__module__}:{function.__qualname__}"


def command(function: str, arguments: Row) -> list[str]:
    """Returns the command that writes the rows that function(**arguments) yields to its stdout, one JSON per line."""
    return [sys.executable, "-m", __name__, function, json.dumps(arguments)]


def rows(function: str, arguments: Row, limit: float) -> Iterator[Row]:
    """Yields the rows that function(**arguments) yields in a process of its own, each as soon as it is there.

    If the function raises an exception, the process dies or `limit` seconds pass, the last row is {"error": SENTENCE}.
    The process and all that it started are killed at the end, also if the caller closes this iterator early.

    Args:
      function: "module:function", which yields rows of JSON values.
      arguments: its keyword arguments, JSON values.
      limit: seconds, including the start of the process.
    """
    deadline, error = time.monotonic() + limit, ""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(function, arguments), stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            for line in _lines(process.stdout.fileno(), deadline):
                yield json.loads(line)
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            error = f"stopped at its limit of {limit:.0f} seconds"
        else:
            log.seek(0)
            error = _cause(status, log.read().decode(errors="replace")) if status else ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    if error:
        yield {"error": error}


def one_line(error: BaseException) -> str:
    """Returns the type and the first line of the message of an exception, shortened."""
    return f"{type(error).__name__}: {first_line(error)}"[:LONGEST_ERROR]


def _lines(pipe: int, deadline: float) -> Iterator[bytes]:
    """Yields the lines written to a pipe until its end; raises TimeoutError at the deadline."""
    rest = b""
    while True:
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *complete, rest = (rest + chunk).split(b"\n")
        yield from complete


def _cause(status: int, log: str) -> str:
    """Returns why a process ended with a status other than 0."""
    if status == -signal.SIGKILL:
        return "the process was killed, probably for lack of main memory"
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it wrote no message")
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"the process ended {how}: {last}"[:LONGEST_ERROR]


def main(function: str, arguments: str) -> None:
    """Runs a function in this process, which dies with the one that started it (on Linux); see `command`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the rows
    startup.avoid_loading_libtpu()

    def send(row: Row) -> None:
        print(json.dumps(row, allow_nan=False), file=results, flush=True)

    module, _, name = function.partition(":")
    try:
        for row in getattr(importlib.import_module(module), name)(**json.loads(arguments)):
            send(row)
    except Exception as error:
        traceback.print_exc()
        send({"error": one_line(error)})


if __name__ == "__main__":
    main(*sys.argv[1:])
