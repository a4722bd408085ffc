"""Prefetching changes when items are produced, not which."""

import threading
import time

import pytest

from jaxclip.pipeline.prefetch import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_are_placed_in_order_by_another_thread():
    placed_by = set()

    def place(item):
        placed_by.add(threading.current_thread().name)
        return -item

    assert list(prefetch(range(50), place)) == [-item for item in range(50)]
    assert placed_by == {"prefetch"} and not threads()


def test_an_empty_iterable_yields_nothing():
    assert list(prefetch([], abs)) == []


def test_items_are_produced_ahead_up_to_the_limit():
    made = []
    items = prefetch(range(100), lambda item: made.append(item) or item, ahead=3)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # one consumed, three queued, and one waiting to be queued
    items.close()


@pytest.mark.parametrize("error", [ValueError("broken record"), SystemExit(3), StopIteration()])
def test_an_exception_is_raised_after_the_items_before_it(error):
    def items():
        yield from range(3)
        raise error

    received = []
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected):
        for item in prefetch(items(), abs):
            received.append(item)
    assert received == [0, 1, 2] and not threads()


def test_an_exception_in_place_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0], lambda item: 1 / item))


def test_closing_ends_a_thread_that_waits_for_the_full_queue():
    items = prefetch(iter(int, 1), abs, ahead=1)
    next(items)
    assert len(threads()) == 1
    items.close()
    assert not threads()


def test_an_iterator_left_alone_ends_its_thread():
    def use():
        for _ in prefetch(iter(int, 1), abs):
            break

    use()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
