"""Stopping early: a signal to any process of a run stops all processes after the same step."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxclip.runtime import distributed

HANDLED = (signal.SIGTERM, signal.SIGINT)
SIGNALS, STEPS = "jaxclip/stop/asked", "jaxclip/stop/at"
"""Folders of the key-value store: the signals that processes received, and the step that each has reached."""
POLL = 0.5  # seconds between two checks for a signal


class Stop:
    """Handler that remembers a signal to stop the run; a second signal of either kind ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._last: float = math.inf  # the step after which all processes stop, once they agree on it
        self._step, self._published, self._lock, self._finished = 0, False, threading.Lock(), threading.Event()
        if distributed.store() is not None:
            threading.Thread(target=self._agree, daemon=True, name="stop").start()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for each in HANDLED:
            signal.signal(each, signal.SIG_DFL)

    def after(self, step: int) -> bool:
        """Returns whether the run stops after this step, the same on all processes; call it after every step."""
        if distributed.store() is None:
            return self.signal is not None
        with self._lock:
            self._step = step
            return step >= self._last

    def close(self) -> None:
        """Tells the other processes the last step of this one, which takes no further steps."""
        self._finished.set()
        if distributed.store() is not None:
            with self._lock:
                self._publish_step()

    def _publish_step(self) -> None:
        if not self._published:
            distributed.store().key_value_set(f"{STEPS}/{distributed.process_id()}", str(self._step))
            self._published = True

    def _agree(self) -> None:
        """Waits until a process receives a signal; then all agree to stop one step after the furthest published step.

        No process takes a step between publishing its step and the agreement, so none is past the agreed step.
        """
        store, own_id, count = distributed.store(), distributed.process_id(), distributed.process_count()
        while not self._finished.wait(POLL):
            if self.signal is not None:
                store.key_value_set(f"{SIGNALS}/{own_id}", str(int(self.signal)), allow_overwrite=True)
            signals = store.key_value_dir_get(SIGNALS)
            if signals:
                with self._lock:
                    self._publish_step()
                    steps = [store.blocking_key_value_get(f"{STEPS}/{i}", distributed.DAY) for i in range(count)]
                    self._last = max(map(int, steps)) + 1
                    self.signal = self.signal or int(signals[0][1])
                return


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yields a Stop that handles SIGTERM and SIGINT, and restores the former handlers at the end."""
    stop = Stop()
    former = {number: signal.signal(number, stop) for number in HANDLED}
    try:
        yield stop
    finally:
        stop.close()
        for number, handler in former.items():
            signal.signal(number, handler)
