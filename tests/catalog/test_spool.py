"""A spool is a sequence that keeps its items on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog.spool import Spool


@given(st.lists(st.one_of(st.binary(), st.text(), st.tuples(st.integers(), st.text()))))
def test_items_are_read_unchanged_in_any_order(tmp_path_factory, items):
    with Spool(tmp_path_factory.getbasetemp()) as spool:
        for item in items:
            spool.append(item)
            assert spool[len(spool) - 1] == item
        assert list(spool) == items and list(spool) == items
        assert [spool[index] for index in reversed(range(len(items)))] == items[::-1]


def test_a_closed_spool_leaves_no_file(tmp_path):
    with Spool(tmp_path) as spool:
        spool.append("x" * 10_000)
        with pytest.raises(IndexError):
            spool[1]
    assert not list(tmp_path.iterdir())
