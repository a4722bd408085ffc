"""An incorrect pair is a mismatch by its rule, every product lends its text about as often, and no N x N is held."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from jaxclip.errors import UserError
from jaxclip.features.incorrect_pairs import mine
from jaxclip.features.pair_table import NONE, fingerprint

VARIANTS = ("random", "below:0.8", "below:0.2", "clustered")


def catalogue(products, *, kinds=12, dimensions=32, noise=0.7, seed=0, shares=None):
    """Returns image features, text features and groups of kinds of products; some names fit another kind."""
    random = np.random.default_rng(seed)
    kind = random.choice(kinds, products, p=shares)
    named = np.where(random.random(products) < 0.8, kind, random.integers(0, kinds, products))
    images, texts = (
        random.normal(size=(kinds, dimensions))[labels] + noise * random.normal(size=(products, dimensions))
        for labels in (kind, named)
    )
    groups = random.integers(0, products - products // 10, products)
    return images.astype(np.float32), texts.astype(np.float32), groups


def all_pairs(images, groups, pairs, threshold):
    """Returns the N x N cosines, and which of all pairs the rule admits, as plainly as it can be said."""
    norms = np.linalg.norm(images.astype(np.float64), axis=1, keepdims=True)
    unit = images / np.where(norms > 0, norms, 1)
    cosines = unit @ unit.T
    admitted = groups[:, None] != groups
    if pairs is not None and pairs.image_clusters is not None:
        admitted &= pairs.image_clusters[:, None] != pairs.image_clusters
        admitted &= pairs.text_clusters[:, None] != pairs.text_clusters
    if threshold is not None:
        admitted &= cosines < threshold
    return cosines, admitted


@st.composite
def small_catalogues(draw):
    """Features with many equal rows, rows of zeros, opposite rows, and groups of any size."""
    products = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, texts = (
        random.integers(-draw(st.integers(0, 3)), 4, (draw(st.integers(1, products)), draw(st.integers(1, 3))))
        for _ in range(2)
    )
    images, texts = (one[random.integers(0, len(one), products)].astype(np.float32) for one in (images, texts))
    return images, texts, random.integers(0, draw(st.integers(1, products)), products)


@settings(max_examples=200, deadline=None)
@given(small_catalogues(), st.sampled_from(("random", "below:0.81", "below:0.23", "clustered")), st.data())
def test_pairs_obey_their_rule_are_as_many_as_can_be_and_use_partners_evenly(products, variant, data):
    images, texts, groups = products
    clusters = data.draw(st.integers(2, len(groups)))
    threshold = float(variant.partition(":")[2]) if variant.startswith("below") else None
    try:
        pairs = mine(images, texts, groups, variant=variant, clusters=clusters, seed=data.draw(st.integers(0, 3)))
    except UserError as error:
        assert "no product has an incorrect pair" in str(error)
        if variant != "clustered":
            assert not all_pairs(images, groups, None, threshold)[1].any()
        return
    cosines, admitted = all_pairs(images, groups, pairs, threshold)
    paired = pairs.products
    assert admitted[paired, pairs.partner[paired]].all()
    assert admitted[paired].any(axis=1).all() and not np.delete(admitted, paired, axis=0).any(), (
        "left out if it must be"
    )
    assert np.isnan(np.delete(pairs.similarity, paired)).all() and (np.delete(pairs.partner, paired) == NONE).all()
    assert pairs.similarity[paired] == pytest.approx(cosines[paired, pairs.partner[paired]], abs=1e-5)
    assert threshold is None or (pairs.similarity[paired] < threshold).all()
    assert pairs.uses.max() <= 1 + (len(groups) - 1) // admitted[paired].sum(axis=1).min()
    found = pairs.summary()
    assert (found["pairs"], found["left_out"]) == (len(paired), len(groups) - len(paired))
    assert pairs.uses.sum() == len(paired)


def test_partners_of_the_chosen_clusters_are_the_least_similar_that_an_even_use_allows():
    checked = 0
    for seed in range(20):
        images, texts, _ = catalogue(12, kinds=3, dimensions=4, seed=seed)
        pairs = mine(images, texts[::-1], np.arange(12), clusters=3, seed=seed)
        if (pairs.uses != 1).any():
            continue  # the clusters drawn leave no even use, and step 3 of the rule took part
        cosines, admitted = all_pairs(images, np.arange(12), pairs, None)
        cosines[~admitted] = np.inf
        visited = pairs.image_clusters[pairs.partner]
        for cluster in range(3):
            products, candidates = (np.flatnonzero(labels == cluster) for labels in (visited, pairs.image_clusters))
            best = min(cosines[products, order].sum() for order in itertools.permutations(candidates))
            assert pairs.similarity[products].sum() == pytest.approx(best, abs=1e-5)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("variant", ("random", "below:0.8", "clustered"))
def test_every_product_lends_its_text_once_where_that_is_possible(variant):
    found = mine(*catalogue(3000), variant=variant).summary()
    assert found["pairs"] == 3000 and found["left_out"] == 0
    assert found["uses_max"] <= 2 and found["never_used"] <= 15


def test_a_cluster_of_more_than_half_is_paired_with_the_rest_as_evenly_as_the_rest_allows():
    images, texts, groups = catalogue(2000, kinds=4, noise=0.2, shares=[0.7, 0.1, 0.1, 0.1])
    pairs = mine(images, texts, groups, clusters=4)
    large = pairs.image_clusters == np.bincount(pairs.image_clusters).argmax()
    assert 0.6 < large.mean() < 0.8 and len(pairs.products) == 2000
    share = large.sum() / (~large).sum()
    assert pairs.uses.max() <= np.ceil(share) + 1
    assert pairs.uses[~large].std() < 0.8


def test_outliers_that_are_the_least_similar_to_everybody_are_nobodys_favourite():
    images, texts, groups = catalogue(1000, noise=0.3)
    images = np.abs(images)
    images[:3] *= -1
    pairs = mine(images, texts, groups)
    cosines, admitted = all_pairs(images, groups, pairs, None)
    plain = np.where(admitted, cosines, np.inf).argmin(axis=1)
    assert np.bincount(plain).max() > 300
    assert pairs.uses.max() <= 2


def test_clustered_pairs_are_less_alike_than_random_ones_and_visit_every_other_cluster():
    products = catalogue(3000, noise=0.4)
    pairs = mine(*products)
    at_random = mine(*products, variant="random")
    assert pairs.similarity.mean() < at_random.similarity.mean() - 0.15
    visits = np.zeros((10, 10), int)
    np.add.at(visits, (pairs.image_clusters, pairs.image_clusters[pairs.partner]), 1)
    assert (visits[~np.eye(10, dtype=bool)] > 0).all() and not visits.diagonal().any()
    assert np.abs(visits.sum(axis=0) - visits.sum(axis=1)).max() <= 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_seed_gives_the_same_pairs_on_any_number_of_cores_and_another_seed_others(variant):
    products = catalogue(1500)
    first = mine(*products, variant=variant, seed=1)
    with threadpool_limits(2):
        again = mine(*products, variant=variant, seed=1)
    assert np.array_equal(first.partner, again.partner)
    assert np.array_equal(first.similarity, again.similarity, equal_nan=True)
    assert first.fingerprint == again.fingerprint == fingerprint(*products)
    other = mine(*products, variant=variant, seed=2)
    assert (first.partner != other.partner).mean() > 0.5


@pytest.mark.parametrize("variant", ("below", "below:", "below:x", "below:nan", "below:-1", "below:1.5", "Random", ""))
def test_an_unknown_variant_is_told_with_those_there_are(variant):
    with pytest.raises(UserError, match="random, clustered, or below:T"):
        mine(*catalogue(20), variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_one_group_have_no_incorrect_pair(variant):
    images, texts, _ = catalogue(50)
    with pytest.raises(UserError, match="group"):
        mine(images, texts, np.zeros(50, np.int64), variant=variant)


def test_what_cannot_be_clustered_is_told():
    images, texts, groups = catalogue(50)
    with pytest.raises(UserError, match="all text features fall into one cluster"):
        mine(images, np.ones_like(texts), groups)
    with pytest.raises(UserError, match="all image features fall into one cluster"):
        mine(np.ones_like(images), texts, groups)
    with pytest.raises(UserError, match="10 clusters of 9 products"):
        mine(images[:9], texts[:9], groups[:9])
    with pytest.raises(UserError, match="1 clusters of 50 products"):
        mine(images, texts, groups, clusters=1)
    for few in (0, 1):
        with pytest.raises(UserError, match=f"{few} products"):
            mine(images[:few], texts[:few], groups[:few], variant="random")
    with pytest.raises(UserError, match="similar"):
        mine(np.ones_like(images), texts, groups, variant="below:0.9")


def test_arrays_that_do_not_fit_together_are_a_mistake():
    images, texts, groups = catalogue(20)
    with pytest.raises(ValueError, match=r"\(20, 32\), \(19, 32\), \(20,\)"):
        mine(images, texts[1:], groups)
    images[3, 1] = np.nan
    with pytest.raises(ValueError, match="image features of 1 rows are not finite"):
        mine(images, texts, groups)


@pytest.mark.parametrize("variant", ("below:0.2", "clustered"))
def test_memory_stays_far_below_all_pairs(variant):
    products = catalogue(20_000, dimensions=16)
    tracemalloc.start()
    try:
        mine(*products, variant=variant)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000**2 / 4, f"{peak / 2**20:.0f} MiB; all pairs are {20_000**2 * 4 / 2**20:.0f} MiB as float32"


@pytest.mark.slow
def test_forty_thousand_products_take_a_minute_at_most():
    products = catalogue(40_000, dimensions=128)
    start = time.perf_counter()
    found = mine(*products).summary()
    assert time.perf_counter() - start < 60
    assert found["pairs"] == 40_000 and found["uses_max"] <= 2 and found["never_used"] <= 200
