"""Nearest neighbours are exact on any number of devices, and the search is compiled once per number of queries."""

import jax
import numpy as np
import pytest

from jaxclip.ranking import index
from jaxclip.ranking.index import NearestNeighbours


def unit_vectors(count, seed, dimension):
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 5, 300, 1001])
def test_neighbours_equal_brute_force_on_any_number_of_devices(devices, size):
    gallery, queries = unit_vectors(size, 1, 16), unit_vectors(9, 2, 16)
    neighbours = NearestNeighbours(gallery, max_k=20, devices=jax.devices()[:devices])
    scores, rows = neighbours(queries)
    all_scores = queries @ gallery.T
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(scores, np.take_along_axis(all_scores, order, 1), atol=1e-6)
    np.testing.assert_array_equal(neighbours.of_product(size - 1), gallery[-1:])
    np.testing.assert_array_equal(neighbours.vectors, gallery)


def test_only_allowed_rows_are_returned_even_if_they_are_few():
    gallery, queries = unit_vectors(500, 1, 16), unit_vectors(4, 2, 16)
    neighbours = NearestNeighbours(gallery, max_k=20)
    for count in (0, 1, 7, 300):
        allowed = np.zeros(500, bool)
        allowed[np.random.default_rng(3).permutation(500)[:count]] = True
        _, rows = neighbours(queries, allowed)
        allowed_scores = np.where(allowed, queries @ gallery.T, -np.inf)
        np.testing.assert_array_equal(rows, np.argsort(-allowed_scores, axis=1, kind="stable")[:, : min(count, 20)])


def test_rows_with_equal_scores_are_in_order_across_devices():
    gallery = np.repeat(unit_vectors(1, 1, 16), 40, axis=0)
    _, rows = NearestNeighbours(gallery, max_k=12)(gallery[:2])
    assert rows.tolist() == [list(range(12))] * 2


def test_the_search_is_compiled_once_per_number_of_queries():
    neighbours = NearestNeighbours(unit_vectors(600, 1, 16), max_k=10)
    allowed = np.random.default_rng(0).random(600) < 0.5
    neighbours(unit_vectors(4, 2, 16))
    before = index._find_nearest._cache_size()
    for seed in range(3):
        neighbours(unit_vectors(4, seed, 16))
        neighbours(unit_vectors(4, seed, 16), allowed)
    assert index._find_nearest._cache_size() == before
