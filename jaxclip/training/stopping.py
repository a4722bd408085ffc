"""Stopping early: a signal to any process of a run stops all processes after the same step."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxclip.runtime import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ASKED, AT = "jaxclip/stop/asked", "jaxclip/stop/at"
POLL = 0.5  # seconds


class Stop:
    """Remembers the signal that asked the run to end; the second one, of either kind, ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._last: float = math.inf  # the step after which all processes stop; set when they have agreed
        self._step, self._answered, self._lock, self._over = 0, False, threading.Lock(), threading.Event()
        if distributed.store() is not None:
            threading.Thread(target=self._agree, daemon=True, name="stop").start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def after(self, step: int) -> bool:
        """Returns whether the run stops after this step; equal on all processes, which call it after every step."""
        if distributed.store() is None:
            return self.signal is not None
        with self._lock:
            self._step = step
            return step >= self._last

    def close(self) -> None:
        """Answers processes that still ask, since this process takes no further step."""
        self._over.set()
        if distributed.store() is not None:
            with self._lock:
                self._answer()

    def _answer(self) -> None:
        if not self._answered:
            distributed.store().key_value_set(f"{AT}/{distributed.process_id()}", str(self._step))
            self._answered = True

    def _agree(self) -> None:
        """Waits until a process receives a signal; then all processes stop one step after the furthest of them.

        A process takes no further step between its answer and the agreement, so none is past the agreed step.
        """
        store, me, count = distributed.store(), distributed.process_id(), distributed.process_count()
        while not self._over.wait(POLL):
            if self.signal is not None:
                store.key_value_set(f"{ASKED}/{me}", str(int(self.signal)), allow_overwrite=True)
            asked = store.key_value_dir_get(ASKED)
            if asked:
                with self._lock:
                    self._answer()
                    steps = [store.blocking_key_value_get(f"{AT}/{i}", distributed.DAY) for i in range(count)]
                    self._last = max(map(int, steps)) + 1
                    self.signal = self.signal or int(asked[0][1])
                return


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yields a Stop that SIGTERM and SIGINT set, and restores the former handlers at the end."""
    stop = Stop()
    former = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        stop.close()
        for number, handler in former.items():
            signal.signal(number, handler)
