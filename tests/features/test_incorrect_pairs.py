"""Incorrect pairs obey their rule and use partners evenly, and mining never holds all N x N pairs in memory."""

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
    """Returns image features, text features and groups of products of several kinds; some texts fit another kind."""
    random = np.random.default_rng(seed)
    kind = random.choice(kinds, products, p=shares)
    text_kind = np.where(random.random(products) < 0.8, kind, random.integers(0, kinds, products))
    images, texts = (
        random.normal(size=(kinds, dimensions))[labels] + noise * random.normal(size=(products, dimensions))
        for labels in (kind, text_kind)
    )
    groups = random.integers(0, products - products // 10, products)
    return images.astype(np.float32), texts.astype(np.float32), groups


def all_pairs(images, groups, pairs, threshold):
    """Returns the N x N cosines and the N x N mask of pairs that the rule admits, by its plain definition."""
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
    """Draws features with equal rows, rows of zeros and opposite rows, and groups of any size."""
    products = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, texts = (
        random.integers(-draw(st.integers(0, 3)), 4, (draw(st.integers(1, products)), draw(st.integers(1, 3))))
        for _ in range(2)
    )
    images, texts = (rows[random.integers(0, len(rows), products)].astype(np.float32) for rows in (images, texts))
    return images, texts, random.integers(0, draw(st.integers(1, products)), products)


@settings(max_examples=200, deadline=None)
@given(small_catalogues(), st.sampled_from(("random", "below:0.81", "below:0.23", "clustered")), st.data())
def test_pairs_obey_their_rule_are_as_many_as_possible_and_use_partners_evenly(products, variant, data):
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
        "a product is left out only if it has no admissible partner"
    )
    assert np.isnan(np.delete(pairs.similarity, paired)).all() and (np.delete(pairs.partner, paired) == NONE).all()
    assert pairs.similarity[paired] == pytest.approx(cosines[paired, pairs.partner[paired]], abs=1e-5)
    assert threshold is None or (pairs.similarity[paired] < threshold).all()
    assert pairs.uses.max() <= 1 + (len(groups) - 1) // admitted[paired].sum(axis=1).min()
    summary = pairs.summary()
    assert (summary["pairs"], summary["left_out"]) == (len(paired), len(groups) - len(paired))
    assert pairs.uses.sum() == len(paired)


def test_partners_within_the_drawn_clusters_have_the_least_total_similarity_under_even_use():
    checked = 0
    for seed in range(20):
        images, texts, _ = catalogue(12, kinds=3, dimensions=4, seed=seed)
        pairs = mine(images, texts[::-1], np.arange(12), clusters=3, seed=seed)
        if (pairs.uses != 1).any():
            continue  # the drawn clusters permit no even use, so step 3 of the rule placed some products
        cosines, admitted = all_pairs(images, np.arange(12), pairs, None)
        cosines[~admitted] = np.inf
        targets = pairs.image_clusters[pairs.partner]
        for cluster in range(3):
            products, candidates = (np.flatnonzero(labels == cluster) for labels in (targets, pairs.image_clusters))
            best = min(cosines[products, order].sum() for order in itertools.permutations(candidates))
            assert pairs.similarity[products].sum() == pytest.approx(best, abs=1e-5)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("variant", ("random", "below:0.8", "clustered"))
def test_nearly_every_product_is_a_partner_once_if_that_is_possible(variant):
    summary = mine(*catalogue(3000), variant=variant).summary()
    assert summary["pairs"] == 3000 and summary["left_out"] == 0
    assert summary["uses_max"] <= 2 and summary["never_used"] <= 15


def test_a_cluster_of_more_than_half_the_products_uses_the_others_evenly():
    images, texts, groups = catalogue(2000, kinds=4, noise=0.2, shares=[0.7, 0.1, 0.1, 0.1])
    pairs = mine(images, texts, groups, clusters=4)
    large = pairs.image_clusters == np.bincount(pairs.image_clusters).argmax()
    assert 0.6 < large.mean() < 0.8 and len(pairs.products) == 2000
    ratio = large.sum() / (~large).sum()
    assert pairs.uses.max() <= np.ceil(ratio) + 1
    assert pairs.uses[~large].std() < 0.8


def test_outliers_that_are_least_similar_to_most_products_are_not_overused():
    images, texts, groups = catalogue(1000, noise=0.3)
    images = np.abs(images)
    images[:3] *= -1
    pairs = mine(images, texts, groups)
    cosines, admitted = all_pairs(images, groups, pairs, None)
    least_similar = np.where(admitted, cosines, np.inf).argmin(axis=1)
    assert np.bincount(least_similar).max() > 300
    assert pairs.uses.max() <= 2


def test_clustered_pairs_are_less_similar_than_random_pairs_and_connect_all_clusters():
    products = catalogue(3000, noise=0.4)
    pairs = mine(*products)
    random_pairs = mine(*products, variant="random")
    assert pairs.similarity.mean() < random_pairs.similarity.mean() - 0.15
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (pairs.image_clusters, pairs.image_clusters[pairs.partner]), 1)
    assert (counts[~np.eye(10, dtype=bool)] > 0).all() and not counts.diagonal().any()
    assert np.abs(counts.sum(axis=0) - counts.sum(axis=1)).max() <= 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_depend_on_the_seed_but_not_on_the_number_of_cores(variant):
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
def test_the_error_for_an_unknown_variant_lists_the_known_ones(variant):
    with pytest.raises(UserError, match="random, clustered, or below:T"):
        mine(*catalogue(20), variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_products_of_one_group_have_no_incorrect_pair(variant):
    images, texts, _ = catalogue(50)
    with pytest.raises(UserError, match="group"):
        mine(images, texts, np.zeros(50, np.int64), variant=variant)


def test_the_error_for_too_few_or_equal_products_says_why():
    images, texts, groups = catalogue(50)
    with pytest.raises(UserError, match="all text features fall into one cluster"):
        mine(images, np.ones_like(texts), groups)
    with pytest.raises(UserError, match="all image features fall into one cluster"):
        mine(np.ones_like(images), texts, groups)
    with pytest.raises(UserError, match=r"incorrect_pairs\.clusters = 10 is not possible with 9 products"):
        mine(images[:9], texts[:9], groups[:9])
    with pytest.raises(UserError, match=r"incorrect_pairs\.clusters = 1 is not possible with 50 products"):
        mine(images, texts, groups, clusters=1)
    for count in (0, 1):
        with pytest.raises(UserError, match=f"{count} products"):
            mine(images[:count], texts[:count], groups[:count], variant="random")
    with pytest.raises(UserError, match="similar"):
        mine(np.ones_like(images), texts, groups, variant="below:0.9")


def test_arrays_of_different_lengths_or_with_nan_are_errors():
    images, texts, groups = catalogue(20)
    with pytest.raises(ValueError, match=r"\(20, 32\), \(19, 32\), \(20,\)"):
        mine(images, texts[1:], groups)
    images[3, 1] = np.nan
    with pytest.raises(ValueError, match="image features have 1 rows that are not finite"):
        mine(images, texts, groups)


@pytest.mark.parametrize("variant", ("below:0.2", "clustered"))
def test_memory_stays_far_below_that_of_all_pairs(variant):
    products = catalogue(20_000, dimensions=16)
    tracemalloc.start()
    try:
        mine(*products, variant=variant)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000**2 / 4, f"{peak / 2**20:.0f} MiB; all pairs are {20_000**2 * 4 / 2**20:.0f} MiB as float32"


@pytest.mark.slow
def test_mining_forty_thousand_products_takes_at_most_a_minute():
    products = catalogue(40_000, dimensions=128)
    start = time.perf_counter()
    summary = mine(*products).summary()
    assert time.perf_counter() - start < 60
    assert summary["pairs"] == 40_000 and summary["uses_max"] <= 2 and summary["never_used"] <= 200
