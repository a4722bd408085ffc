"""Places the next batches on the devices while the current step runs."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T, U = TypeVar("T"), TypeVar("U")


def prefetch(items: Iterable[T], place: Callable[[T], U], *, ahead: int = 2) -> Iterator[U]:
    """Yields place(item) for each item in order, from a thread that works up to `ahead` items in advance.

    An exception in the thread is raised in the caller at the item that caused it. Closing the iterator ends the thread.
    """
    placed: queue.Queue = queue.Queue(maxsize=ahead)
    closed = threading.Event()
    end = object()

    def put(entry: tuple) -> bool:
        while not closed.is_set():
            try:
                placed.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((place(item), None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            item, error = placed.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        closed.set()
        thread.join()
