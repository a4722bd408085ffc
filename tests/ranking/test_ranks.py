"""Ranks by counting equal ranks by sorting, also with ties, duplicates and NaN."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxclip.errors import UserError
from jaxclip.ranking import kernel
from jaxclip.ranking import ranks as ranks_module
from jaxclip.ranking.label_ranks import label_ranks
from jaxclip.ranking.layout import PRECISIONS
from jaxclip.ranking.ranks import both_ways, make_mesh, ranks
from jaxclip.ranking.relevance import Relevance
from jaxclip.runtime import compiler

ONE_DEVICE = jax.make_mesh((1, 1), kernel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])


@pytest.fixture(params=["cpu", "gpu"])
def backend(request):
    """The back end whose form of the kernel is used; all forms run on CPUs."""
    with compiler.compiling_for(request.param):
        yield request.param


def brute_force(queries, gallery, relevance):
    """Returns the ranks and the scores (Q, G), from one float64 sort per query.

    NaN scores come last; of equal scores, relevant items come after the others, and then by index.
    """
    with np.errstate(invalid="ignore"):
        scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    ranks = []
    for row, (start, end) in enumerate(zip(relevance.indptr[:-1], relevance.indptr[1:], strict=True)):
        relevant = relevance.indices[start:end]
        is_relevant = np.isin(np.arange(len(gallery)), relevant)
        order = sorted(
            range(len(gallery)),
            key=lambda item: (np.isnan(scores[row, item]), -np.nan_to_num(scores[row, item]), is_relevant[item], item),
        )
        ranks += [order.index(item) + 1 for item in relevant]
    return np.array(ranks), scores


@st.composite
def cases(draw):
    """Returns queries, gallery and relevance, with many equal scores and perhaps infinite numbers and NaN."""
    size, queries = draw(st.sampled_from([1, 3, 8, 9, 13])), draw(st.integers(1, 11))
    others = [np.nan, np.inf, -np.inf] if draw(st.booleans()) else []
    elements = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, *others])
    gallery_groups = draw(hnp.arrays(np.int64, size, elements=st.integers(0, draw(st.integers(0, 5)))))
    query_groups = draw(hnp.arrays(np.int64, queries, elements=st.sampled_from(sorted(set(gallery_groups.tolist())))))
    return (
        draw(hnp.arrays(np.float32, (queries, 2), elements=elements)),
        draw(hnp.arrays(np.float32, (size, 2), elements=elements)),
        Relevance.from_groups(query_groups, gallery_groups),
    )


def assert_equals_a_sort(result, expected, scores, k):
    np.testing.assert_array_equal(result.ranks, expected)
    assert result.nan_count == np.isnan(scores).sum()
    assert all(len(set(row)) == len(row) for row in result.top_items.tolist())
    best = -np.sort(np.where(np.isnan(scores), np.inf, -scores), axis=1)[:, :k]
    np.testing.assert_array_equal(np.where(np.isnan(result.top_scores), -np.inf, result.top_scores), best)
    np.testing.assert_array_equal(np.take_along_axis(scores, result.top_items, axis=1), result.top_scores)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"], indirect=True)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.sampled_from([3, 20]))
def test_ranks_equal_a_sort_in_float64_in_both_directions(backend, case, k):
    queries, gallery, relevance = case
    forth = ranks(queries, gallery, relevance, top_k=k, mesh=ONE_DEVICE)
    expected, scores = brute_force(queries, gallery, relevance)
    assert_equals_a_sort(forth, expected, scores, k)
    if len(set(relevance.indices.tolist())) == len(gallery):
        forth, back = both_ways(queries, gallery, relevance, top_k=k, mesh=ONE_DEVICE)
        assert_equals_a_sort(forth, expected, scores, k)
        reverse = relevance.transpose(len(gallery))
        assert_equals_a_sort(back, brute_force(gallery, queries, reverse)[0], scores.T, k)


def integer_embeddings(seed, queries, items, per_group):
    """Returns queries, gallery and relevance with many ties and with several items and queries in each group.

    Products of these small whole numbers are exact in float32.
    """
    random = np.random.default_rng(seed)
    groups = random.permutation(np.arange(items) % (items // per_group))
    query_groups = np.concatenate([np.unique(groups), random.choice(groups, queries - len(np.unique(groups)))])
    embeddings = (random.integers(-3, 4, (size, 4)).astype(np.float32) for size in (queries, items))
    return *embeddings, Relevance.from_groups(random.permutation(query_groups), groups)


@pytest.mark.parametrize(("per_group", "tile"), [(1, 128), (7, 320), (40, 2048)])
def test_ranks_do_not_depend_on_the_tile(per_group, tile):
    queries, gallery, relevance = integer_embeddings(1, 430, 400, per_group)
    expected, scores = brute_force(queries, gallery, relevance)
    forth, back = both_ways(queries, gallery, relevance, top_k=8, tile=tile, mesh=ONE_DEVICE)
    assert_equals_a_sort(forth, expected, scores, 8)
    reverse = relevance.transpose(len(gallery))
    assert_equals_a_sort(back, brute_force(gallery, queries, reverse)[0], scores.T, 8)
    np.testing.assert_array_equal(label_ranks(queries, gallery, relevance)[0], expected)


@pytest.mark.parametrize("layout", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_any_layout_of_eight_devices_equals_one_device(layout):
    equals_a_sort_on_any_devices(*layout)


@pytest.mark.parametrize(("backend", "layout"), [("gpu", (8, 1)), ("gpu", (2, 4)), ("gpu", (1, 8)), ("tpu", (2, 4))])
def test_the_form_for_accelerators_equals_a_sort_on_one_and_eight_devices(backend, layout):
    with compiler.compiling_for(backend):
        equals_a_sort_on_any_devices(*layout)


def equals_a_sort_on_any_devices(*layout):
    """Checks ranks on one device against a sort, and those of a layout of eight devices against one device."""
    queries, gallery, relevance = integer_embeddings(2, 530, 470, 3)
    queries[3], gallery[7] = np.nan, np.inf
    one_device, eight_devices = (
        both_ways(queries, gallery, relevance, top_k=5, tile=128, mesh=mesh)
        for mesh in (ONE_DEVICE, make_mesh(*layout))
    )
    expected, scores = brute_force(queries, gallery, relevance)
    reverse = relevance.transpose(len(gallery))
    assert_equals_a_sort(one_device[0], expected, scores, 5)
    assert_equals_a_sort(one_device[1], brute_force(gallery, queries, reverse)[0], scores.T, 5)
    for one, many in zip(one_device, eight_devices, strict=True):
        np.testing.assert_array_equal(many.ranks, one.ranks)
        np.testing.assert_array_equal(many.top_scores, one.top_scores)
        np.testing.assert_array_equal(many.top_items, one.top_items)
        assert many.nan_count == one.nan_count > 0


def test_the_best_items_of_real_scores_equal_a_full_sort():
    random = np.random.default_rng(3)
    queries, gallery = random.normal(size=(900, 48)), random.normal(size=(1100, 48))
    relevance = Relevance.from_groups(np.arange(900), np.arange(1100) % 900)
    for result, scores in zip(
        both_ways(queries, gallery, relevance, top_k=20, tile=320, mesh=ONE_DEVICE),
        (queries @ gallery.T, gallery @ queries.T),
        strict=True,
    ):
        np.testing.assert_array_equal(result.top_items, np.argsort(-scores, axis=1)[:, :20])


def test_long_lists_of_best_items_with_many_ties_equal_a_stable_sort(backend):
    random = np.random.default_rng(6)
    queries, gallery = random.integers(-3, 4, (2000, 6)), random.integers(-3, 4, (2000, 6))
    relevance = Relevance.from_groups(np.arange(2000), np.arange(2000))
    # Two tiles, each of several chunks.
    forth = ranks(queries, gallery, relevance, top_k=100, mesh=ONE_DEVICE, tile=1600)
    order = np.argsort(-(queries @ gallery.T), axis=1, kind="stable")[:, :100]
    np.testing.assert_array_equal(forth.top_items, order)
    np.testing.assert_array_equal(forth.top_scores, np.take_along_axis(queries @ gallery.T, order, axis=1))


def test_the_sweep_is_repeated_if_an_initial_score_is_one_bit_off(backend, monkeypatch):
    queries, gallery, relevance = integer_embeddings(4, 210, 200, 2)
    initial_scores = ranks_module.initial_scores

    def one_bit_too_high(*arguments):
        return np.nextafter(initial_scores(*arguments), np.float32(np.inf))

    monkeypatch.setattr(ranks_module, "initial_scores", one_bit_too_high)
    expected, _ = brute_force(queries, gallery, relevance)
    np.testing.assert_array_equal(ranks(queries, gallery, relevance, mesh=ONE_DEVICE).ranks, expected)


def test_bfloat16_changes_few_ranks():
    random = np.random.default_rng(5)
    gallery = random.normal(size=(1000, 64))
    queries = gallery + 2 * random.normal(size=(1000, 64))
    queries, gallery = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, gallery))
    relevance = Relevance.from_groups(np.arange(1000), np.arange(1000))
    exact, half, three = (
        ranks(queries, gallery, relevance, mesh=ONE_DEVICE, products=products).ranks for products in PRECISIONS
    )
    assert 0 < (exact != half).mean() < 0.05
    assert abs(np.mean(exact <= 10) - np.mean(half <= 10)) < 0.005
    assert (exact != three).mean() < 0.005 and abs(exact - three).max() <= 1


@pytest.mark.parametrize("products", PRECISIONS)
def test_embeddings_exact_in_bfloat16_have_equal_ranks_at_every_precision(products):
    queries, gallery, relevance = integer_embeddings(9, 210, 200, 2)
    expected, _ = brute_force(queries, gallery, relevance)
    result = ranks(queries, gallery, relevance, products=products, mesh=ONE_DEVICE)
    np.testing.assert_array_equal(result.ranks, expected)


def test_the_form_for_accelerators_multiplies_bfloat16_parts():
    queries, gallery, relevance = integer_embeddings(9, 210, 200, 2)
    with compiler.compiling_for("gpu"):
        result = ranks(queries, gallery, relevance, products="bfloat16_3x", mesh=ONE_DEVICE)
    np.testing.assert_array_equal(result.ranks, brute_force(queries, gallery, relevance)[0])


def test_an_unknown_precision_and_infinite_embeddings_in_bfloat16_3x_are_refused():
    queries, gallery, relevance = integer_embeddings(9, 21, 20, 2)
    with pytest.raises(ValueError, match="'half' must be one of float32, bfloat16, bfloat16_3x"):
        ranks(queries, gallery, relevance, products="half")
    gallery = gallery.astype(np.float32)
    gallery[3, 1] = np.inf
    with pytest.raises(ValueError, match="finite"):
        ranks(queries, gallery, relevance, products="bfloat16_3x")


def test_relevant_items_rank_last_among_ties_and_by_index_among_themselves():
    queries, gallery = np.ones((2, 4)), np.ones((6, 4))
    result = ranks(queries, gallery, Relevance.from_groups(["a", "b"], ["a", "b", "c", "b", "c", "b"]))
    assert result.ranks.tolist() == [6, 4, 5, 6]


def test_equal_embeddings_have_bitwise_equal_scores_in_any_position():
    random = np.random.default_rng(0)
    gallery = np.repeat(random.normal(size=(1, 257)), 1500, axis=0)
    queries = random.normal(size=(1500, 257))
    result = ranks(queries, gallery, Relevance.from_groups(np.arange(1500), np.arange(1500)), tile=256, mesh=ONE_DEVICE)
    assert (result.ranks == 1500).all()


def test_infinite_scores_rank_before_nan(backend):
    gallery = np.array([[np.nan], [-np.inf], [0.0], [np.inf]])
    result = ranks(np.ones((4, 1)), gallery, Relevance.from_groups(range(4), range(4)), top_k=4)
    assert result.ranks.tolist() == [4, 3, 2, 1]
    assert result.top_items[0].tolist() == [3, 2, 1, 0]
    np.testing.assert_array_equal(result.top_scores[0], [np.inf, 0, -np.inf, np.nan])
    assert result.nan_count == 4


def test_sizes_that_round_to_the_same_tile_compile_once():
    random = np.random.default_rng(2)
    visit = kernel.make_visit(ONE_DEVICE, blocks=1, ks=(0, 0), back=True, finite=True)
    before = visit._cache_size()
    for size in (70, 100, 128):
        embeddings = random.normal(size=(size, 5))
        both_ways(embeddings, embeddings, Relevance.from_groups(np.arange(size), np.arange(size)), mesh=ONE_DEVICE)
    assert visit._cache_size() - before == 1


PROCESS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
from jaxclip.ranking.ranks import both_ways, make_mesh
from jaxclip.ranking.relevance import Relevance
random = np.random.default_rng(6)
queries, gallery = random.integers(-3, 4, (2, 300, 4)).astype(np.float32)
relevance = Relevance.from_groups(np.arange(300) % 90, random.permutation(np.arange(300) % 90))
forth, back = both_ways(queries, gallery, relevance, top_k=5, tile=128, mesh=make_mesh(2, 2))
names = ("ranks", "top_scores", "top_items")
np.savez(sys.argv[3], *(getattr(result, name) for result in (forth, back) for name in names))
"""


@pytest.mark.slow
def test_each_of_two_processes_returns_the_ranks_of_a_single_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    files = [tmp_path / f"{number}.npz" for number in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(number), str(port), str(file)])
        for number, file in enumerate(files)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    random = np.random.default_rng(6)
    queries, gallery = random.integers(-3, 4, (2, 300, 4)).astype(np.float32)
    relevance = Relevance.from_groups(np.arange(300) % 90, random.permutation(np.arange(300) % 90))
    alone = both_ways(queries, gallery, relevance, top_k=5, mesh=ONE_DEVICE)
    expected = [getattr(result, name) for result in alone for name in ("ranks", "top_scores", "top_items")]
    for file in files:
        with np.load(file) as arrays:
            for name, array in zip(arrays.files, expected, strict=True):
                np.testing.assert_array_equal(arrays[name], array)


def test_items_of_a_group_are_ascending_and_queries_without_a_relevant_item_are_named():
    relevance = Relevance.from_groups(["b", "a", "b"], ["a", "b", "a", "b"])
    assert relevance.indptr.tolist() == [0, 2, 4, 6]
    assert relevance.indices.tolist() == [1, 3, 0, 2, 1, 3]
    with pytest.raises(UserError, match=r"2 of 3 queries .* query 0 \(group 'x'\), query 2 \(group 'y'\)"):
        Relevance.from_groups(["x", "a", "y"], ["a", "b"])


def test_wrong_shapes_raise_with_the_shapes():
    relevance = Relevance.from_groups([0, 1], [0, 1])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        ranks(np.ones((2, 3)), np.ones((2, 4)), relevance)
    with pytest.raises(ValueError, match="3 queries"):
        ranks(np.ones((3, 4)), np.ones((2, 4)), relevance)
    with pytest.raises(ValueError, match="at least one"):
        Relevance(np.array([0, 1, 1]), np.array([0]))


def test_ranks_need_no_tensorflow():
    code = "import sys; sys.modules['tensorflow'] = None; import jaxclip.ranking.ranks"
    subprocess.run([sys.executable, "-c", code], check=True)
