"""Interchangeable products form one group, and no split divides a group."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog import groups
from jaxclip.catalog.groups import split
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError


def assign(products, pixel_hashes):
    return groups.assign(products, [product.id for product in products], pixel_hashes)


def product(id_, *captions):
    return Product(id_, (Path(f"{id_}.jpg"),), captions)


def test_products_with_the_same_caption_or_pixels_are_a_group_named_by_its_smallest_id():
    products = [
        product("5", "Puma Shoe"),
        product("3", "puma  SHOE"),
        product("4", "Other"),
        product("2", "Third", "other "),
        product("1", "Third one"),
        product("0", "Alone"),
    ]
    pixels = [["a"], ["b"], ["c"], ["e", "d"], ["d"], []]
    assert assign(products, pixels).names == ["3", "3", "1", "1", "1", "0"]
    assert assign([product("1", "x"), product("2", "y")], [[], []]).names == ["1", "2"], (
        "products without pictures must not be grouped"
    )


def test_a_product_of_another_catalogue_shares_a_key_with_its_group_whatever_its_id():
    def keys_of(products, pixels):
        found = assign(products, pixels)
        return {name: {k for k, o in zip(found.keys.tolist(), found.owners, strict=True) if found.names[o] == name}
                for name in found.names}  # fmt: skip

    ours = keys_of([product("1", "Puma Shoe"), product("2", "Bag"), product("3", "Hat")], [["a"], ["b"], ["c"]])
    theirs = keys_of([product("x", "PUMA shoe"), product("y", "Renamed"), product("3", "Scarf")], [["z"], ["b"], ["d"]])
    assert ours["1"] & theirs["x"] and ours["2"] & theirs["y"]
    assert not theirs["3"] & set.union(*ours.values())


def test_the_name_of_a_readers_group_means_nothing_in_another_catalogue():
    ours, theirs = (
        assign([replace(product(name, name), group="1"), replace(product(name + "2", name * 2), group="1")], [[], []])
        for name in ("a", "b")
    )
    assert len(set(ours.names)) == len(set(theirs.names)) == 1 and not np.isin(ours.keys, theirs.keys).any()
    assert len(ours.keys) == len(ours.owners) == 2


def test_images_of_a_class_folder_are_one_group_and_a_split_takes_whole_classes():
    products = [product(f"{name}/{i}", name) for name in ("dress", "hat", "shoe") for i in range(10)]
    names = assign(products, [[str(i)] for i in range(30)]).names
    assert Counter(names) == {"dress/0": 10, "hat/0": 10, "shoe/0": 10}
    assert sum(split(names, 0.4, seed=0)) == 10


CAPTIONS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=2)
PRODUCTS = st.lists(st.tuples(CAPTIONS, st.sampled_from(["", *"pqrstuv"])), max_size=12)


def connected(items):
    """Returns the set of groups, computed as a plain transitive closure."""
    groups = [{index} for index in range(len(items))]
    for one, (captions, pixels) in enumerate(items):
        for other in range(one):
            if set(captions) & set(items[other][0]) or (pixels and pixels == items[other][1]):
                merged = groups[one] | groups[other]
                for index in merged:
                    groups[index] = merged
    return {frozenset(group) for group in groups}


@given(PRODUCTS, st.randoms())
def test_groups_are_connected_components_in_any_order(items, random):
    order = list(range(len(items)))
    random.shuffle(order)
    products = [product(f"{index:02}", *items[index][0]) for index in order]
    names = assign(products, [[items[index][1]] if items[index][1] else [] for index in order]).names
    actual = {frozenset(index for index, name in zip(order, names, strict=True) if name == one) for one in names}
    assert actual == connected(items)
    assert set(names) == {f"{min(group):02}" for group in actual}


def reachable(sizes):
    sums = {0}
    for size in sizes:
        sums |= {size + one for one in sums}
    return sums


GROUPS = st.lists(st.integers(1, 6), min_size=2, max_size=12)


@given(GROUPS, st.integers(0, 5), st.data())
def test_a_split_divides_no_group_and_is_as_large_as_groups_allow(sizes, seed, data):
    groups = [f"g{index}" for index, size in enumerate(sizes) for _ in range(size)]
    target = data.draw(st.integers(1, len(groups) - 1))
    best = max(one for one in reachable(sizes) if one <= target)
    if best == 0:
        with pytest.raises(UserError, match="smallest group"):
            split(groups, target, seed)
        return
    test = split(groups, target, seed)
    assert sum(test) == best
    sides = set(zip(groups, test, strict=True))
    assert len(sides) == len(sizes), "every group must be on one side"
    shuffled = data.draw(st.permutations(range(len(groups))))
    assert split([groups[index] for index in shuffled], target, seed) == [test[index] for index in shuffled]


def test_a_share_is_rounded_and_a_different_seed_gives_a_different_split():
    groups = [str(index) for index in range(1000)]
    first = split(groups, 0.3, seed=0)
    assert sum(first) == 300
    assert first == split(groups, 300, seed=0)
    assert first != split(groups, 0.3, seed=1)
    assert sum(split(groups, 0.3, seed=1)) == 300


def test_a_split_is_the_same_on_every_machine():
    groups = [str(index) for index in range(20)]
    test = split(groups, 4, seed=7)
    assert [group for group, is_test in zip(groups, test, strict=True) if is_test] == ["6", "9", "11", "16"]


@pytest.mark.parametrize("test", [0, 0.0, -1, 4, 5, 1.0 - 1e-9, 0.01, -0.5])
def test_a_split_leaves_products_on_both_sides(test):
    with pytest.raises(UserError, match="cannot hold out"):
        split(["a", "b", "c", "d"], test, seed=0)


def test_an_empty_catalogue_cannot_be_split():
    with pytest.raises(UserError):
        split([], 1, seed=0)


def test_lists_of_different_lengths_raise():
    with pytest.raises(ValueError, match="argument"):
        assign([product("1", "x")], [])
