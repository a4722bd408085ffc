"""Draws, pairs, their ceiling and trials: each draw is a pure function of its seed; pictures change no draw."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.errors import UserError
from jaxclip.ranking import trials
from jaxclip.ranking.draws import DRAWS, single_draws
from jaxclip.ranking.metrics import best_rank, hit, hit_ceiling, item_hit_ceiling
from jaxclip.ranking.ranks import both_ways, ranks
from jaxclip.ranking.relevance import Relevance


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(0, 5))
def test_each_draw_has_one_product_of_each_group_and_depends_on_its_number_alone(groups, seed):
    drawn = single_draws(groups, seed=seed)
    assert drawn.shape == (DRAWS, len(set(groups)))
    for draw in drawn:
        assert [groups[item] for item in draw] == sorted(set(groups))
    np.testing.assert_array_equal(single_draws(groups, seed=seed, draws=3), drawn[:3])
    numbers = np.unique(groups, return_inverse=True)[1]
    np.testing.assert_array_equal(single_draws(numbers, seed=seed), drawn)


def test_draws_are_uniform_and_differ_between_seeds():
    groups = np.repeat([0, 1, 2], [1, 4, 15])
    drawn = single_draws(groups, draws=6000)
    counts = np.bincount(drawn[:, 1], minlength=5)[1:]
    assert abs(counts / 6000 - 0.25).max() < 0.03
    assert abs(np.bincount(drawn[:, 2], minlength=20)[5:] / 6000 - 1 / 15).max() < 0.02
    assert (drawn != single_draws(groups, draws=6000, seed=1)).any()


def test_pairs_are_relevant_in_any_order_and_queries_without_one_are_refused():
    relevance = Relevance.from_pairs([2, 0, 2, 1, 2], [5, 3, 1, 0, 5], 3)
    assert relevance.indptr.tolist() == [0, 1, 2, 4] and relevance.indices.tolist() == [3, 0, 1, 5]
    with pytest.raises(UserError, match="2 of 4 queries have no relevant item; the first is query 1"):
        Relevance.from_pairs([0, 3], [0, 0], 4)
    with pytest.raises(ValueError, match="rows below 2"):
        Relevance.from_pairs([0, 2], [0, 0], 2)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=8), st.integers(1, 5))
def test_no_ranking_of_equal_texts_exceeds_the_ceiling_and_one_reaches_it(queries, k):
    """Each of three texts has one of all orders of four items; all choices are tried."""
    texts, items = zip(*queries, strict=True)
    orders = list(permutations(range(4)))
    best = [
        max(sum(item in order[:k] for text, item in queries if text == mine) for order in orders) for mine in range(3)
    ]
    assert hit_ceiling(texts, items, k) == pytest.approx(sum(best) / len(queries), abs=1e-12)


def test_real_ranks_reach_the_ceiling_of_pairs():
    texts, items = np.array([0, 0, 0, 1, 2]), np.arange(5)
    assert [hit_ceiling(texts, items, k) for k in (1, 2, 3, 10)] == [0.6, 0.8, 1.0, 1.0]
    assert hit_ceiling(["a", "a", "a", "b"], [7, 7, 8, 8], 1) == 0.75
    gallery = np.eye(5)
    queries = np.stack([gallery[0] * 3 + gallery[1] * 2 + gallery[2]] * 3 + [gallery[3], gallery[4]])
    relevance = Relevance.from_pairs(np.arange(5), items, 5)
    found = ranks(queries, gallery, relevance)
    for k in (1, 2, 3):
        assert hit(found.ranks, relevance.indptr, k).mean() == hit_ceiling(texts, items, k)
    with pytest.raises(ValueError, match="Q > 0"):
        hit_ceiling([], [], 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=12))
def test_an_item_finds_its_text_below_all_equal_texts_of_others(captions):
    """Each item asks with the direction of one of its texts; the best choice of the text reaches the ceiling."""
    texts, items = (np.asarray(column) for column in zip(*captions, strict=True))
    items = np.unique(items, return_inverse=True)[1]
    relevance = Relevance.from_pairs(items, np.arange(len(items)), items.max() + 1)
    best = np.full(items.max() + 1, np.inf)
    for text in range(4):
        queries = np.tile(np.eye(4)[text], (items.max() + 1, 1))
        found = ranks(queries, np.eye(4)[texts], relevance)
        best = np.minimum(best, best_rank(found.ranks, relevance.indptr))
    for k in (1, 2, 5):
        assert item_hit_ceiling(texts, items, k) == pytest.approx((best <= k).mean())


def catalogue(products, most):
    random = np.random.default_rng(0)
    owners = np.repeat(np.arange(products), random.integers(1, most + 1, products))
    texts, pictures = (random.normal(size=(size, 6)).astype(np.float32) for size in (products + 9, len(owners)))
    groups = random.integers(0, products * 3 // 4, products)
    groups = np.unique(groups, return_inverse=True)[1]
    return texts, pictures, np.concatenate([groups, groups[:9]]), groups, owners


@pytest.mark.parametrize("size", [32, 100])
def test_trials_rank_drawn_products_by_their_best_picture(size, monkeypatch):
    texts, pictures, text_groups, groups, owners = catalogue(200, 5)
    seen, draw = [], trials._draw_members
    monkeypatch.setattr(trials, "_draw_members", lambda *arguments: seen.append(draw(*arguments)) or seen[-1])
    found = trials.best_ranks(texts, pictures, text_groups, groups, owners=owners, size=size, trials=6)
    assert found.shape == (2, 6, size) and len(seen) == 12
    for trial, (text, chosen) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert len(set(groups[chosen])) == size and (groups[chosen] == text_groups[text]).all()
        mine = np.concatenate([np.flatnonzero(owners == item) for item in chosen])
        own = np.repeat(np.arange(size), np.bincount(owners)[chosen])
        pairs = Relevance.from_pairs(np.arange(size), np.arange(size), size)
        forth, back = both_ways(texts[text], pictures[mine], pairs, owners=own)
        np.testing.assert_array_equal(found[0, trial], forth.ranks)
        np.testing.assert_array_equal(found[1, trial], back.ranks)


def test_trials_of_products_with_one_picture_draw_as_ever():
    texts, pictures, text_groups, groups, _ = catalogue(200, 1)
    found = trials.best_ranks(texts, pictures, text_groups, groups, trials=4)
    assert found.shape == (2, 4, 100)
    assert found.sum(axis=(1, 2)).tolist() == [19402, 19546]
    with_owners = trials.best_ranks(texts, pictures, text_groups, groups, owners=np.arange(200), trials=4)
    np.testing.assert_array_equal(found, with_owners)
    several = trials.best_ranks(
        texts, np.repeat(pictures, 3, axis=0), text_groups, groups, owners=np.arange(600) // 3, trials=4
    )
    np.testing.assert_array_equal(found, several)


def test_trials_larger_than_the_catalogue_are_refused():
    texts, pictures, text_groups, groups, owners = catalogue(40, 2)
    with pytest.raises(UserError, match="a trial needs 32 distinct groups, but there are"):
        trials.best_ranks(texts, pictures, text_groups, groups, owners=owners, size=32)
    with pytest.raises(ValueError, match="40 products with 39 groups"):
        trials.best_ranks(texts, pictures, text_groups, groups[:39], owners=owners, size=5)
