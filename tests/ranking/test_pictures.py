"""Ranks of products with several pictures equal a sort of their best scores in float64; so do those for pictures."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.ranking import kernel, sweep
from jaxclip.ranking import ranks as ranks_module
from jaxclip.ranking.label_ranks import label_ranks
from jaxclip.ranking.layout import PRECISIONS, Layout
from jaxclip.ranking.picture_ranks import picture_ranks
from jaxclip.ranking.pictures import Gallery, arrange, first_pictures
from jaxclip.ranking.ranks import both_ways, make_mesh, ranks
from jaxclip.ranking.relevance import Relevance
from jaxclip.runtime import compiler

ONE_DEVICE = jax.make_mesh((1, 1), kernel.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:1])
LEFT_OUT, NAN = -1e9, -1e8  # finite stand-ins, below all scores


@pytest.fixture(autouse=True)
def compile_quickly(quick_compilation):
    """Switches XLA's optimisations off."""


def best_scores(queries, gallery, owners, own=None):
    """Returns (Q, G) float64, the highest of each product's scores; NAN and LEFT_OUT if nothing else is there."""
    with np.errstate(invalid="ignore"):
        scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    scores = np.where(np.isnan(scores), NAN, np.maximum(scores, -1e7))
    if own is not None:
        rows = np.flatnonzero(own >= 0)
        scores[rows, own[rows]] = LEFT_OUT
    return np.maximum.reduceat(scores, np.searchsorted(owners, np.arange(owners[-1] + 1)), axis=1)


def sorted_ranks(scores, relevance):
    """Returns the ranks from one sort per query: irrelevant before relevant among equal scores, then by index."""
    relevant = np.zeros(scores.shape, bool)
    relevant[relevance.rows, relevance.indices] = True
    order = np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), relevant, -scores), axis=1)
    return 1 + np.argsort(order, axis=1)[relevant]


def assert_equals_a_sort(result, scores, relevance, k):
    np.testing.assert_array_equal(result.ranks, sorted_ranks(scores, relevance))
    np.testing.assert_array_equal(result.top_scores, -np.sort(-scores, axis=1)[:, :k])
    np.testing.assert_array_equal(np.take_along_axis(scores, result.top_items, axis=1), result.top_scores)
    assert all(len(set(row)) == len(row) for row in result.top_items.tolist())


PRODUCTS, TEXTS, LARGEST = 150, 190, 30
HISTOGRAMS = [
    np.repeat(np.arange(1, 9), [60, 30, 20, 10, 10, 10, 6, 4]),
    np.repeat([1, 2, 8, 30], [70, 40, 38, 2]),
]
"""The pictures of each of 150 products, in any order; few, because each compiles programs of its own."""


def catalogue(seed, histogram):
    """Returns texts, pictures, owners and groups of a catalogue with equal rows; its largest group has 30 products."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(PRODUCTS), random.permutation(histogram))
    groups = random.integers(0, random.integers(8, 60), PRODUCTS)
    groups = np.unique(groups, return_inverse=True)[1]
    groups[random.permutation(np.flatnonzero(groups != 0))[: LARGEST - (groups == 0).sum()]] = 0
    groups = np.unique(groups, return_inverse=True)[1]
    text_groups = np.concatenate([np.unique(groups), random.choice(groups, TEXTS - len(np.unique(groups)))])
    texts, pictures = (random.integers(-3, 4, (size, 4)).astype(np.float32) for size in (TEXTS, len(owners)))
    pictures = pictures[
        np.where(random.random(len(owners)) < 0.2, random.permutation(len(owners)), np.arange(len(owners)))
    ]
    return texts, pictures, owners, random.permutation(text_groups), groups


def devices(*shape):
    return ONE_DEVICE if shape == (1, 1) else make_mesh(*shape)


EXAMPLES = [pytest.param(12), pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_ranks_of_products_equal_a_sort_in_both_directions_on_one_and_eight_devices(mesh, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from(HISTOGRAMS))
    def equal_a_sort(seed, histogram):
        texts, pictures, owners, text_groups, groups = catalogue(seed, histogram)
        relevance = Relevance.from_groups(text_groups, groups)
        scores = best_scores(texts, pictures, owners)
        forth, back = both_ways(texts, pictures, relevance, owners=owners, top_k=4, tile=256, mesh=devices(*mesh))
        assert_equals_a_sort(forth, scores, relevance, 4)
        assert_equals_a_sort(back, scores.T, relevance.transpose(PRODUCTS), 4)

    equal_a_sort()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("mesh", [(1, 1), (1, 8)])
def test_a_product_is_nan_only_if_all_of_its_pictures_are(backend, mesh):
    texts, pictures, owners, text_groups, groups = catalogue(3, HISTOGRAMS[0])
    random = np.random.default_rng(0)
    pictures[random.choice(len(pictures), 90)] = np.nan
    pictures[owners == 7] = np.nan
    with np.errstate(invalid="ignore"):
        pictures[random.choice(len(pictures), 20)] *= np.inf  # infinite, or NaN where the number was 0
    texts[5] = np.nan
    relevance = Relevance.from_groups(text_groups, groups)
    scores = best_scores(texts, pictures, owners)
    with compiler.compiling_for(backend):
        forth, back = both_ways(texts, pictures, relevance, owners=owners, tile=256, mesh=devices(*mesh))
    np.testing.assert_array_equal(forth.ranks, sorted_ranks(np.minimum(scores, 1e7), relevance))
    np.testing.assert_array_equal(back.ranks, sorted_ranks(np.minimum(scores, 1e7).T, relevance.transpose(PRODUCTS)))
    assert forth.nan_count == (scores == NAN).sum() > TEXTS
    np.testing.assert_array_equal(
        label_ranks(texts, pictures, relevance, owners=owners)[0], sorted_ranks(np.minimum(scores, 1e7), relevance)
    )


@pytest.mark.parametrize(("backend", "products"), [*(("cpu", name) for name in PRECISIONS), ("tpu", "bfloat16_3x")])
def test_pictures_exact_in_bfloat16_give_equal_ranks_at_every_precision(backend, products):
    texts, pictures, owners, text_groups, groups = catalogue(1, HISTOGRAMS[1])
    relevance = Relevance.from_groups(text_groups, groups)
    with compiler.compiling_for(backend):
        result = ranks(texts, pictures, relevance, owners=owners, products=products, mesh=ONE_DEVICE)
    np.testing.assert_array_equal(result.ranks, sorted_ranks(best_scores(texts, pictures, owners), relevance))


@pytest.mark.parametrize(("backend", "width"), [("cpu", 33), ("cpu", 64), ("cpu", 512), ("gpu", 64)])
def test_the_first_scores_are_those_of_the_sweep_which_is_not_repeated(monkeypatch, backend, width):
    sweeps, run = [], sweep.Sweep.run
    monkeypatch.setattr(sweep.Sweep, "run", lambda *arguments: (sweeps.append(1), run(*arguments))[1])
    random = np.random.default_rng(0)
    owners = np.repeat(np.arange(PRODUCTS), random.permutation(HISTOGRAMS[0]))
    texts, pictures = (random.normal(size=(size, width)) for size in (PRODUCTS, len(owners)))
    relevance = Relevance.from_groups(np.arange(PRODUCTS), np.arange(PRODUCTS))
    with compiler.compiling_for(backend):
        ranks(texts, pictures, relevance, owners=owners, tile=128, mesh=ONE_DEVICE)
    assert len(sweeps) == 1


def test_equal_pictures_have_equal_scores_at_any_place():
    random = np.random.default_rng(0)
    owners = np.repeat(np.arange(600), random.integers(1, 10, 600))
    pictures = np.repeat(random.normal(size=(1, 257)), len(owners), axis=0)
    relevance = Relevance.from_groups(np.arange(600), np.arange(600))
    texts = random.normal(size=(600, 257))
    result = ranks(texts, pictures, relevance, owners=owners, tile=640, mesh=ONE_DEVICE)
    assert (result.ranks == 600).all()


def test_products_of_one_picture_each_are_ranked_as_items(monkeypatch):
    random = np.random.default_rng(0)
    texts, items = random.normal(size=(2, 80, 5))
    relevance = Relevance.from_groups(np.arange(80), np.arange(80))
    expected = both_ways(texts, items, relevance, top_k=3, mesh=ONE_DEVICE)
    monkeypatch.setattr(ranks_module, "arrange", None)
    result = both_ways(texts, items, relevance, owners=np.arange(80), top_k=3, mesh=ONE_DEVICE)
    for one, other in zip(expected, result, strict=True):
        for field in ("ranks", "top_items", "top_scores"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12) | st.integers(1, 40), min_size=1, max_size=400),
    st.sampled_from([64, 320, 2048]),
    st.sampled_from([1, 8]),
    st.integers(0, 9),
)
def test_each_product_has_the_places_of_its_own_pictures_and_few_repeats(counts, max_tile, shards, seed):
    counts = np.array(counts)
    owners = np.repeat(np.arange(len(counts)), counts)
    embeddings, order = (
        np.arange(len(owners), dtype=np.float32)[:, None],
        np.random.default_rng(seed).permutation(len(counts)),
    )
    layout = arrange(Layout(embeddings, order, shards, 1, max_tile, None), first_pictures(owners, len(owners)))
    assert sorted(layout.order) == list(range(len(counts)))
    tiles = layout.rows.reshape(-1, layout.places)
    slots = np.full((len(tiles), layout.tile), -1)
    slots.reshape(-1)[: len(counts)] = layout.order
    seen, first_place, first_slot = set(), 0, 0
    for pictures, products in layout.segments:
        places = tiles[:, first_place : first_place + pictures * products].reshape(-1, pictures, products)
        here = slots[:, None, first_slot : first_slot + products]
        np.testing.assert_array_equal(np.where(places < 0, -1, owners[places]), np.broadcast_to(here, places.shape))
        seen |= set(places[places >= 0].tolist())
        first_place, first_slot = first_place + pictures * products, first_slot + products
    assert first_slot == layout.tile and seen == set(range(len(owners)))
    assert 0 <= layout.places - first_place < kernel.MULTIPLE == np.gcd(layout.places, kernel.MULTIPLE)
    assert (tiles[:, first_place:] == -1).all()
    found = layout.lines(0, layout.rows.size)[:, 0]
    np.testing.assert_array_equal(found, np.where(layout.rows < 0, 0, layout.rows))


def test_few_places_are_repeats_or_empty():
    random = np.random.default_rng(0)
    counts = random.integers(1, 9, 20_000)
    counts[random.choice(20_000, 100)] = 30
    owners = np.repeat(np.arange(20_000), counts)
    layout = Layout(np.zeros((len(owners), 1), np.float32), np.arange(20_000), 8, 1, 2048, None)
    layout = arrange(layout, first_pictures(owners, len(owners)))
    assert layout.places <= 1.3 * 2048
    assert len(owners) < layout.rows.size < 1.12 * len(owners)


def test_neighbours_stay_in_one_tile():
    owners = np.repeat(np.arange(1000), np.tile([1, 2, 3, 4], 250))
    layout = Layout(np.zeros((2500, 1), np.float32), np.arange(1000), 1, 1, 320, None)
    layout = arrange(layout, first_pictures(owners, 2500))
    assert layout.blocks == 8
    assert np.abs(layout.slots() - np.arange(1000)).max() <= layout.tile


@pytest.mark.parametrize("owners", [[0, 0, 2], [0, 1, 0], [1, 1, 2], [0, 1], [[0, 1, 2]], []])
def test_owners_that_are_not_those_of_the_pictures_are_refused(owners):
    with pytest.raises(ValueError, match=r"owners must be \(3,\) numbers of products, ascending from 0"):
        ranks(np.ones((1, 2)), np.ones((3, 2)), Relevance.from_groups([0], [0, 1]), owners=owners)


def test_relevance_counts_products():
    with pytest.raises(ValueError, match="1 queries and 2 gallery items"):
        ranks(np.ones((1, 2)), np.ones((3, 2)), Relevance.from_groups([2], [0, 1, 2]), owners=[0, 0, 1])


def pictures_that_ask(seed, most):
    """Returns pictures of 1 to `most` for each product, queries among them, and groups that some products lack."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(120), random.permutation(np.resize(np.arange(1, most + 1), 120)))
    groups = random.integers(0, 60, 120)
    pictures = random.integers(-3, 4, (len(owners), 4)).astype(np.float32)
    asked = np.sort(random.choice(len(owners), 100, replace=False))
    own = np.where(random.random(100) < 0.8, asked, -1)
    query_groups = groups[owners[asked]]
    query_groups[random.integers(0, 100)] = 99
    return pictures[asked], Gallery.of(pictures, owners, own), query_groups, groups


@pytest.mark.parametrize(("backend", "mesh"), [("cpu", (1, 1)), ("cpu", (2, 4)), ("gpu", (1, 1))])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_ranks_for_pictures_that_leave_themselves_out_equal_a_sort(backend, mesh, examples):
    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.sampled_from([1, 7]))
    def equal_a_sort(seed, most):
        queries, gallery, query_groups, groups = pictures_that_ask(seed, most)
        owners = np.repeat(np.arange(120), np.diff(gallery.starts))
        with compiler.compiling_for(backend):
            result = picture_ranks(queries, gallery, query_groups, groups, top_k=5, tile=128, mesh=devices(*mesh))
        scores = best_scores(queries, gallery.embeddings, owners, gallery.own)
        relevant = (query_groups[:, None] == groups) & (scores > LEFT_OUT)
        np.testing.assert_array_equal(result.queries, np.flatnonzero(relevant.any(axis=1)))
        rows, items = np.nonzero(relevant[result.queries])
        np.testing.assert_array_equal(result.relevance.rows, rows)
        np.testing.assert_array_equal(result.relevance.indices, items)
        assert_equals_a_sort(result.ranks, scores[result.queries], result.relevance, 5)
        np.testing.assert_array_equal(result.candidates, (scores[result.queries] > LEFT_OUT).sum(axis=1))

    equal_a_sort()


def test_the_best_of_a_small_gallery_leave_the_own_product_out():
    pictures = np.array([[1.0], [2.0], [3.0]])
    result = picture_ranks(pictures, Gallery.of(pictures, own=[0, 1, 2]), [0, 0, 1], [0, 0, 1], top_k=9)
    assert result.queries.tolist() == [0, 1] and result.candidates.tolist() == [2, 2]
    assert result.ranks.top_items.tolist() == [[2, 1], [2, 0]] and result.ranks.ranks.tolist() == [2, 2]
    assert picture_ranks(pictures, Gallery.of(pictures, own=[0, 1, 2]), [0, 1, 2], [0, 1, 2]) is None


def test_wrong_own_pictures_and_groups_are_refused():
    with pytest.raises(ValueError, match="rows of the gallery's 3 pictures"):
        Gallery.of(np.ones((3, 1)), own=[3])
    with pytest.raises(ValueError, match="2 queries with 2 groups and 3 own pictures, 3 products with 3 groups"):
        picture_ranks(np.ones((2, 1)), Gallery.of(np.ones((3, 1)), own=[0, 1, 2]), [0, 0], [0, 0, 0])
    alone = Gallery.of(np.ones((3, 1)), own=[0])
    with pytest.raises(ValueError, match="no picture but the one that is left out"):
        ranks_module.search(np.ones((1, 1)), alone, [Relevance.from_groups([0], [0, 1, 2])], top_k=0)
