"""Embedding keeps rows in order and drops the padding of the last batch."""

import numpy as np
import pytest

from jaxclip.towers.embed import embed, padded_blocks


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_rows_stay_in_order_and_padding_is_dropped(count):
    rows = np.arange(2.0 * count).reshape(count, 2)
    blocks = list(padded_blocks(rows, 4))
    assert {block.shape for block in blocks} == {(4, 2)}
    np.testing.assert_array_equal(embed(lambda batch: -batch, blocks, count), -rows)


def test_the_last_block_is_padded_with_copies_of_a_real_row():
    *_, last = padded_blocks(np.asarray([[1], [2], [3]]), 2)
    np.testing.assert_array_equal(last, [[3], [3]])


def test_a_batch_is_started_before_the_previous_one_is_fetched():
    events = []

    class Running:
        def __init__(self, number):
            events.append(("started", number))
            self.number = number

        def __array__(self, dtype=None, copy=None):
            events.append(("fetched", self.number))
            return np.full((1, 1), self.number, np.float32)

    np.testing.assert_array_equal(embed(Running, iter(range(3)), 3), [[0], [1], [2]])
    assert events == [
        ("started", 0), ("started", 1), ("fetched", 0), ("started", 2), ("fetched", 1), ("fetched", 2),
    ]  # fmt: skip


def test_too_few_rows_are_an_error():
    with pytest.raises(ValueError, match="5 rows expected, the batches hold 4"):
        embed(lambda batch: batch, [np.zeros((4, 2))], 5)
