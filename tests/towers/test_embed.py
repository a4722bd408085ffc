"""Embedding a split keeps its rows in order and cuts off what only filled up the last batch."""

import numpy as np
import pytest

from jaxclip.towers.embed import embed, padded_blocks


@pytest.mark.parametrize("count", [1, 4, 7, 8])
def test_rows_come_in_order_and_padding_is_cut_off(count):
    rows = np.arange(2.0 * count).reshape(count, 2)
    blocks = list(padded_blocks(rows, 4))
    assert {block.shape for block in blocks} == {(4, 2)}
    np.testing.assert_array_equal(embed(lambda batch: -batch, blocks, count), -rows)


def test_the_last_block_is_filled_up_with_real_rows():
    *_, last = padded_blocks(np.asarray([[1], [2], [3]]), 2)
    np.testing.assert_array_equal(last, [[3], [3]])


def test_a_batch_is_started_before_the_one_before_is_fetched():
    happened = []

    class Running:
        def __init__(self, number):
            happened.append(("started", number))
            self.number = number

        def __array__(self, dtype=None, copy=None):
            happened.append(("fetched", self.number))
            return np.full((1, 1), self.number, np.float32)

    np.testing.assert_array_equal(embed(Running, iter(range(3)), 3), [[0], [1], [2]])
    assert happened == [
        ("started", 0), ("started", 1), ("fetched", 0), ("started", 2), ("fetched", 1), ("fetched", 2),
    ]  # fmt: skip


def test_too_few_rows_are_a_mistake():
    with pytest.raises(ValueError, match="5 rows expected, the batches hold 4"):
        embed(lambda batch: batch, [np.zeros((4, 2))], 5)
