"""Filters of a gallery: attributes that divide it, products that pass."""

import numpy as np
import pytest

from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.serving.gallery import Gallery


def gallery(rows):
    products = [
        Product(str(n), None, (f"product {n}",), category, attributes) for n, (category, attributes) in enumerate(rows)
    ]
    return Gallery("shop", products, lambda number: b"", lambda number: None)


SHOP = gallery(
    [
        ("Shoes", {"colour": "Blue", "kind": "Shoes", "sku": "a"}),
        ("Shoes", {"colour": "Red", "kind": "Shoes", "sku": "b"}),
        ("Shirts", {"colour": "Blue", "kind": "Shirts", "sku": "c"}),
        ("Shirts", {"kind": "Shirts", "sku": "d", "season": "Winter"}),
        ("Shirts", {"colour": "Blue", "kind": "Shirts", "sku": "e"}),
    ]
)


def test_facets_are_what_divides_the_gallery_into_few_kinds_each_said_once():
    assert [(facet.name, facet.values) for facet in SHOP.facets()] == [
        ("category", [("Shirts", 3), ("Shoes", 2)]),
        ("colour", [("Blue", 3), ("Red", 1)]),
    ]


@pytest.mark.parametrize(
    ("filters", "passing"),
    [
        ({"colour": ["Blue"]}, [0, 2, 4]),
        ({"colour": ["Blue", "Red"]}, [0, 1, 2, 4]),
        ({"colour": ["Blue"], "category": ["Shirts"]}, [2, 4]),
        ({"season": ["Winter"], "category": ["Shoes"]}, []),
        ({"sku": ["d"]}, [3]),
    ],
)
def test_values_are_alternatives_and_attributes_all_count(filters, passing):
    assert np.flatnonzero(SHOP.allowed(filters)).tolist() == passing


def test_without_filters_nothing_is_held_back():
    assert SHOP.allowed({}) is None


@pytest.mark.parametrize(
    ("filters", "words"),
    [({"color": ["Blue"]}, "no 'color'; did you mean 'colour'"), ({"colour": ["blue"]}, "colour 'blue'; did you mean")],
)
def test_an_unknown_attribute_or_value_is_told_with_the_nearest(filters, words):
    with pytest.raises(UserError, match=words):
        SHOP.allowed(filters)


def test_products_are_found_by_id_and_no_other_text():
    assert SHOP.number("3") == 3
    assert SHOP.number("../3") is None and SHOP.number("") is None


def test_a_gallery_of_pictures_alone_has_no_facets_and_no_captions():
    bare = Gallery("shop", [Product(str(n), None, ()) for n in range(3)], lambda number: b"", lambda number: None)
    assert bare.facets() == [] and bare.captions == [""] * 3
