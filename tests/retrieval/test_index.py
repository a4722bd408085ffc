"""The embedding index is never wrong, whatever happens to its file; neighbours are exact on any number of devices."""

import multiprocessing

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.errors import UserError
from jaxclip.retrieval import index as module
from jaxclip.retrieval.index import EmbeddingIndex, NearestNeighbours

D = 6


def key(number):
    return int(number).to_bytes(16, "big")


def vectors(count, seed=0, dimension=D):
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def opened(path, encoder="towers", **more):
    return EmbeddingIndex(path, encoder=encoder, dimension=D, **more)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "index" / "towers.rows"
    with opened(path) as index:
        index.append([key(n) for n in range(4)], vectors(4))
        index.append([key(n) for n in range(4, 7)], vectors(7)[4:])
    return path


def test_vectors_come_back_by_content_in_the_order_asked_for(written):
    with opened(written) as index:
        asked = [5, 0, 5, 6]
        np.testing.assert_array_equal(index.vectors([key(n) for n in asked]), vectors(7)[asked])
        assert index.dropped == 0


def test_only_what_is_new_is_missing_and_each_content_once(written):
    with opened(written) as index:
        assert index.missing([key(9), key(3), key(8), key(9), key(0)]).tolist() == [0, 2]
        index.append([key(9)], vectors(10)[9:])
        assert index.missing([key(9), key(3)]).tolist() == []
        np.testing.assert_array_equal(index.vectors([key(9)]), vectors(10)[9:])
    with opened(written) as index:
        assert len(index) == 8


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_row_is_embedded_again_and_never_served(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "towers.rows"
    with opened(path) as index:
        index.append([key(n) for n in range(5)], vectors(5))
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[place // 8] ^= 1 << place % 8
    path.write_bytes(raw)
    said = []
    with opened(path, say=said.append) as index:
        damaged = place // 8 // (len(raw) // 5)
        assert index.missing([key(n) for n in range(5)]).tolist() == [damaged]
        assert len(said) == 1 and str(path) in said[0]
        kept = [n for n in range(5) if n != damaged]
        np.testing.assert_array_equal(index.vectors([key(n) for n in kept]), vectors(5)[kept])
        index.append([key(damaged)], vectors(5)[[damaged]])
    with opened(path) as index:
        np.testing.assert_array_equal(index.vectors([key(n) for n in range(5)]), vectors(5))


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 5 * (20 + 4 * D)))
def test_an_interrupted_writing_goes_on_after_its_last_whole_row(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "towers.rows"
    with opened(path) as index:
        index.append([key(n) for n in range(5)], vectors(5))
    with path.open("r+b") as file:
        file.truncate(cut)
    with opened(path) as index:
        missing = index.missing([key(n) for n in range(5)])
        assert missing.tolist() == list(range(cut // (20 + 4 * D), 5))
        index.append([key(n) for n in missing], vectors(5)[missing])
        np.testing.assert_array_equal(index.vectors([key(n) for n in range(5)]), vectors(5))


def test_rows_of_another_encoder_are_not_taken(written):
    with opened(written, encoder="other towers") as index:
        assert len(index) == 0 and index.dropped > 0


def test_a_server_that_has_the_file_mapped_is_not_disturbed_by_its_repair(written):
    with opened(written) as index:
        served = index._map()
        before = np.array(served)
    with opened(written, encoder="other towers"):
        np.testing.assert_array_equal(served, before)


def test_vectors_that_are_not_finite_are_refused(written):
    with opened(written) as index, pytest.raises(UserError, match="not finite"):
        index.append([key(20)], np.full((1, D), np.nan, np.float32))


def _hold(path, entered, leave):
    with opened(path):
        entered.set()
        leave.wait(60)


def test_two_processes_do_not_write_at_once(written):
    context = multiprocessing.get_context("fork")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(written, entered, leave))
    other.start()
    try:
        assert entered.wait(60)

        def say(line):
            assert "another process" in line
            leave.set()

        with opened(written, say=say) as index:
            assert len(index) == 7 and leave.is_set()
    finally:
        leave.set()
        other.join()


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 300, 1001])
def test_neighbours_equal_brute_force_on_any_number_of_devices(devices, size):
    gallery, queries = vectors(size, 1, 16), vectors(9, 2, 16)
    neighbours = NearestNeighbours(gallery, most=20, devices=jax.devices()[:devices])
    scores, rows = neighbours(queries)
    exact = queries @ gallery.T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-6)
    np.testing.assert_array_equal(neighbours.vector(size - 1), gallery[-1])


def test_only_what_is_allowed_is_found_however_little_that_is():
    gallery, queries = vectors(500, 1, 16), vectors(4, 2, 16)
    neighbours = NearestNeighbours(gallery, most=20)
    for count in (0, 1, 7, 300):
        allowed = np.zeros(500, bool)
        allowed[np.random.default_rng(3).permutation(500)[:count]] = True
        _, rows = neighbours(queries, allowed)
        exact = np.where(allowed, queries @ gallery.T, -np.inf)
        np.testing.assert_array_equal(rows, np.argsort(-exact, axis=1, kind="stable")[:, : min(count, 20)])


def test_equal_scores_come_by_row_over_the_borders_of_devices():
    gallery = np.repeat(vectors(1, 1, 16), 40, axis=0)
    _, rows = NearestNeighbours(gallery, most=12)(gallery[:2])
    assert rows.tolist() == [list(range(12))] * 2


def test_a_number_of_queries_is_compiled_once():
    neighbours = NearestNeighbours(vectors(600, 1, 16), most=10)
    allowed = np.random.default_rng(0).random(600) < 0.5
    neighbours(vectors(4, 2, 16))
    before = module._nearest._cache_size()
    for seed in range(3):
        neighbours(vectors(4, seed, 16))
        neighbours(vectors(4, seed, 16), allowed)
    assert module._nearest._cache_size() == before
