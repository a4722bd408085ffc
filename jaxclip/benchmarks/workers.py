"""Worker processes: each implementation has its own memory and threads, and only one of them runs at a time."""

import importlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from jaxclip.errors import UserError

Calls = Mapping[str, Callable[[], Any]]
"""Name -> a function to measure; it blocks until its work is done."""


class Worker:
    """A process that creates the calls of an implementation once, and runs them on request.

    It is a context manager; leaving it ends the process.

    Args:
      name: name of the implementation, for messages.
      make: "module:function" that returns the calls. Only the process imports the module.
      arguments: arguments of that function.

    Raises:
      UserError: the process ended before it answered, for example because memory ran out.
      RuntimeError: the function or a call raised an exception.
    """

    def __init__(self, name: str, make: str, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, worker_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker_end, make, arguments))
        self._process.start()
        worker_end.close()
        self.calls: list[str] = self._answer()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def run(self, call: str) -> tuple[float, Any]:
        """Returns the seconds that a call took, and its return value."""
        self._pipe.send(call)
        return self._answer()

    def peak_memory(self) -> int:
        """Returns the peak bytes of main memory of the process so far (Linux)."""
        with open(f"/proc/{self._process.pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024

    def _answer(self) -> Any:
        try:
            value, failure = self._pipe.recv()
        except EOFError:
            self._process.join()
            cause = ", probably for lack of memory: measure something smaller" if self._process.exitcode == -9 else ""
            raise UserError(f"the process of {self.name} ended with status {self._process.exitcode}{cause}") from None
        if failure:
            raise RuntimeError(f"{self.name} failed:\n{failure}")
        return value


def _serve(pipe: Connection, make: str, arguments: tuple) -> None:
    """Answers requests for calls until the pipe is closed; runs in the worker process."""
    module, _, function = make.partition(":")
    try:
        calls: Calls = getattr(importlib.import_module(module), function)(*arguments)
        pipe.send((list(calls), None))
        while True:
            call = calls[pipe.recv()]
            start = time.perf_counter()
            value = call()
            pipe.send(((time.perf_counter() - start, value), None))
    except EOFError:
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))
