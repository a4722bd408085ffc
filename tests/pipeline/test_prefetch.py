"""Prefetching changes when items are made, never which."""

import threading
import time

import pytest

from jaxclip.pipeline.prefetch import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_placed_and_in_order_from_another_thread():
    placed_by = set()

    def place(item):
        placed_by.add(threading.current_thread().name)
        return -item

    assert list(prefetch(range(50), place)) == [-item for item in range(50)]
    assert placed_by == {"prefetch"} and not threads()


def test_no_items_are_no_items():
    assert list(prefetch([], abs)) == []


def test_items_are_made_ahead_and_not_further_than_asked():
    made = []
    items = prefetch(range(100), lambda item: made.append(item) or item, ahead=3)
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 5  # the one taken, three that wait, and one in hand
    items.close()


@pytest.mark.parametrize("error", [ValueError("broken record"), SystemExit(3), StopIteration()])
def test_an_exception_is_raised_behind_the_items_before_it(error):
    def items():
        yield from range(3)
        raise error

    found = []
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected):
        for item in prefetch(items(), abs):
            found.append(item)
    assert found == [0, 1, 2] and not threads()


def test_an_exception_of_placing_is_raised_too():
    with pytest.raises(ZeroDivisionError):
        list(prefetch([1, 0], lambda item: 1 / item))


def test_closing_ends_the_thread_even_while_it_waits_to_hand_over():
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
