"""Stored embeddings are never wrong, even if their file is damaged, and none is computed twice."""

import multiprocessing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.towers.embed import embed_stored, padded_blocks
from jaxclip.towers.store import EmbeddingStore, content_key

D = 6


def key(number):
    return int(number).to_bytes(16, "big")


def vectors(count, seed=0, dimension=D):
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def open_store(path, fingerprint="towers", **options):
    return EmbeddingStore(path, fingerprint=fingerprint, dimension=D, **options)


@pytest.fixture
def path(tmp_path):
    """A file with the embeddings of the contents 0 to 6, appended in two parts."""
    path = tmp_path / "embeddings" / "towers.rows"
    with open_store(path) as store:
        store.append([key(n) for n in range(4)], vectors(4))
        store.append([key(n) for n in range(4, 7)], vectors(7)[4:])
    return path


def test_vectors_are_returned_by_content_in_the_requested_order(path):
    with open_store(path) as store:
        requested = [5, 0, 5, 6]
        np.testing.assert_array_equal(store.vectors([key(n) for n in requested]), vectors(7)[requested])
        assert store.dropped == 0


def test_contents_without_an_embedding_are_missing_and_listed_once(path):
    with open_store(path) as store:
        assert store.missing([key(9), key(3), key(8), key(9), key(0)]).tolist() == [0, 2]
        store.append([key(9)], vectors(10)[9:])
        assert store.missing([key(9), key(3)]).tolist() == []
        np.testing.assert_array_equal(store.vectors([key(9)]), vectors(10)[9:])
    with open_store(path) as store:
        assert len(store) == 8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_row_is_embedded_again_and_never_served(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "towers.rows"
    with open_store(path) as store:
        store.append([key(n) for n in range(5)], vectors(5))
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    messages = []
    with open_store(path, say=messages.append) as store:
        damaged = bit // 8 // (len(raw) // 5)
        assert store.missing([key(n) for n in range(5)]).tolist() == [damaged]
        assert len(messages) == 1 and str(path) in messages[0]
        intact = [n for n in range(5) if n != damaged]
        np.testing.assert_array_equal(store.vectors([key(n) for n in intact]), vectors(5)[intact])
        store.append([key(damaged)], vectors(5)[[damaged]])
    with open_store(path) as store:
        np.testing.assert_array_equal(store.vectors([key(n) for n in range(5)]), vectors(5))


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 5 * (20 + 4 * D)))
def test_an_interrupted_write_continues_after_the_last_complete_row(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("embeddings") / "towers.rows"
    with open_store(path) as store:
        store.append([key(n) for n in range(5)], vectors(5))
    with path.open("r+b") as file:
        file.truncate(cut)
    with open_store(path) as store:
        missing = store.missing([key(n) for n in range(5)])
        assert missing.tolist() == list(range(cut // (20 + 4 * D), 5))
        store.append([key(n) for n in missing], vectors(5)[missing])
        np.testing.assert_array_equal(store.vectors([key(n) for n in range(5)]), vectors(5))


def test_rows_of_another_encoder_are_not_used(path):
    with open_store(path, fingerprint="other towers") as store:
        assert len(store) == 0 and store.dropped > 0


def test_rewriting_the_file_does_not_change_it_for_a_server_that_has_it_mapped(path):
    with open_store(path) as store:
        mapped = store._map()
        before = np.array(mapped)
    with open_store(path, fingerprint="other towers"):
        np.testing.assert_array_equal(mapped, before)


class Interrupted(Exception):
    pass


def negation(contents, seen, cut=None):
    """Returns the keys, encoder and batches for `embed_stored`; the encoder negates contents.

    The first value of each content in a batch is appended to `seen`. Batch number `cut` raises Interrupted.
    """

    def batches(numbers):
        for count, block in enumerate(padded_blocks(contents[numbers], 4)):
            if count == cut:
                raise Interrupted
            seen.extend(block[:, 0].tolist())
            yield block

    return [content_key(row.tobytes()) for row in contents], lambda batch: -batch, batches


def test_interrupted_embedding_continues_and_equal_contents_are_embedded_once(tmp_path):
    contents = vectors(21)[[*range(21), 3, 3, 20]]
    store, seen = open_store(tmp_path / "towers.rows"), []
    with pytest.raises(Interrupted):
        embed_stored(store, *negation(contents, seen, cut=4))
    assert len(seen) == 16
    seen.clear()
    np.testing.assert_array_equal(embed_stored(open_store(store.path), *negation(contents, seen)), -contents)
    assert set(seen) == set(contents[12:21, 0].tolist()), "the last batch before the cut was not stored"
    seen.clear()
    np.testing.assert_array_equal(
        embed_stored(open_store(store.path), *negation(contents[::-1], seen)), -contents[::-1]
    )
    more = vectors(23)[::-1]
    np.testing.assert_array_equal(embed_stored(open_store(store.path), *negation(more, seen)), -more)
    assert set(seen) == set(more[:2, 0].tolist())


def _hold_lock(path, entered, leave):
    """Keeps the store open, from setting `entered` until `leave` is set."""
    with open_store(path):
        entered.set()
        leave.wait(60)


def test_two_processes_do_not_write_at_the_same_time(path):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold_lock, args=(path, entered, leave))
    other.start()
    try:
        assert entered.wait(60)

        def say(line):
            assert "another process" in line
            leave.set()

        with open_store(path, say=say) as store:
            assert len(store) == 7 and leave.is_set()
    finally:
        leave.set()
        other.join()
