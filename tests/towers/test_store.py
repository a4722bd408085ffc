"""Stored embeddings are never wrong, whatever happens to their file, and none is computed twice."""

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


def opened(path, fingerprint="towers", **more):
    return EmbeddingStore(path, fingerprint=fingerprint, dimension=D, **more)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "kept" / "towers.rows"
    with opened(path) as store:
        store.append([key(n) for n in range(4)], vectors(4))
        store.append([key(n) for n in range(4, 7)], vectors(7)[4:])
    return path


def test_vectors_are_returned_by_content_in_the_requested_order(written):
    with opened(written) as store:
        requested = [5, 0, 5, 6]
        np.testing.assert_array_equal(store.vectors([key(n) for n in requested]), vectors(7)[requested])
        assert store.dropped == 0


def test_only_new_contents_are_missing_and_each_only_once(written):
    with opened(written) as store:
        assert store.missing([key(9), key(3), key(8), key(9), key(0)]).tolist() == [0, 2]
        store.append([key(9)], vectors(10)[9:])
        assert store.missing([key(9), key(3)]).tolist() == []
        np.testing.assert_array_equal(store.vectors([key(9)]), vectors(10)[9:])
    with opened(written) as store:
        assert len(store) == 8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_row_is_embedded_again_and_never_served(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "towers.rows"
    with opened(path) as store:
        store.append([key(n) for n in range(5)], vectors(5))
    raw = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    said = []
    with opened(path, say=said.append) as store:
        damaged = bit // 8 // (len(raw) // 5)
        assert store.missing([key(n) for n in range(5)]).tolist() == [damaged]
        assert len(said) == 1 and str(path) in said[0]
        intact = [n for n in range(5) if n != damaged]
        np.testing.assert_array_equal(store.vectors([key(n) for n in intact]), vectors(5)[intact])
        store.append([key(damaged)], vectors(5)[[damaged]])
    with opened(path) as store:
        np.testing.assert_array_equal(store.vectors([key(n) for n in range(5)]), vectors(5))


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 5 * (20 + 4 * D)))
def test_an_interrupted_write_continues_after_the_last_complete_row(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "towers.rows"
    with opened(path) as store:
        store.append([key(n) for n in range(5)], vectors(5))
    with path.open("r+b") as file:
        file.truncate(cut)
    with opened(path) as store:
        missing = store.missing([key(n) for n in range(5)])
        assert missing.tolist() == list(range(cut // (20 + 4 * D), 5))
        store.append([key(n) for n in missing], vectors(5)[missing])
        np.testing.assert_array_equal(store.vectors([key(n) for n in range(5)]), vectors(5))


def test_rows_of_another_encoder_are_not_used(written):
    with opened(written, fingerprint="other towers") as store:
        assert len(store) == 0 and store.dropped > 0


def test_a_server_with_the_file_mapped_is_not_disturbed_by_its_repair(written):
    with opened(written) as store:
        served = store._map()
        before = np.array(served)
    with opened(written, fingerprint="other towers"):
        np.testing.assert_array_equal(served, before)


class Interrupted(Exception):
    pass


def negated(contents, seen, cut=None):
    """Returns keys, encoder and batches that embed contents as their negatives; interrupted before batch `cut`.

    The first value of each content is appended to `seen`.
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
    store, seen = opened(tmp_path / "kept.rows"), []
    with pytest.raises(Interrupted):
        embed_stored(store, *negated(contents, seen, cut=4))
    assert len(seen) == 16
    seen.clear()
    np.testing.assert_array_equal(embed_stored(opened(store.path), *negated(contents, seen)), -contents)
    assert set(seen) == set(contents[12:21, 0].tolist()), "the last batch before the cut had not been fetched"
    seen.clear()
    np.testing.assert_array_equal(embed_stored(opened(store.path), *negated(contents[::-1], seen)), -contents[::-1])
    more = vectors(23)[::-1]
    np.testing.assert_array_equal(embed_stored(opened(store.path), *negated(more, seen)), -more)
    assert set(seen) == set(more[:2, 0].tolist())


def _hold(path, entered, leave):
    with opened(path):
        entered.set()
        leave.wait(60)


def test_two_processes_do_not_write_at_the_same_time(written):
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(written, entered, leave))
    other.start()
    try:
        assert entered.wait(60)

        def say(line):
            assert "another process" in line
            leave.set()

        with opened(written, say=say) as store:
            assert len(store) == 7 and leave.is_set()
    finally:
        leave.set()
        other.join()
