"""Neighbours are exact on any number of devices, and no number of queries is compiled twice."""

import jax
import numpy as np
import pytest

from jaxclip.ranking import index as module
from jaxclip.ranking.index import NearestNeighbours


def vectors(count, seed, dimension):
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


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
    np.testing.assert_array_equal(neighbours.vectors, gallery)


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
