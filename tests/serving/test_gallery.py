"""Filters of a gallery: which attributes are offered as filters, and which products pass them."""

import numpy as np
import pytest

from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.serving.gallery import Gallery


def make_gallery(rows):
    """Returns a gallery with a product for each (category, attributes)."""
    products = [
        Product(str(number), (), (f"product {number}",), category, attributes)
        for number, (category, attributes) in enumerate(rows)
    ]
    return Gallery("shop", products, lambda number: b"", lambda number: None)


SHOP = make_gallery(
    [
        ("Shoes", {"colour": "Blue", "kind": "Shoes", "sku": "a"}),
        ("Shoes", {"colour": "Red", "kind": "Shoes", "sku": "b"}),
        ("Shirts", {"colour": "Blue", "kind": "Shirts", "sku": "c"}),
        ("Shirts", {"kind": "Shirts", "sku": "d", "season": "Winter"}),
        ("Shirts", {"colour": "Blue", "kind": "Shirts", "sku": "e"}),
    ]
)


def test_facets_are_the_attributes_with_few_values_and_equivalent_ones_are_dropped():
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
def test_a_product_passes_if_each_attribute_has_one_of_its_values(filters, passing):
    assert np.flatnonzero(SHOP.allowed(filters)).tolist() == passing


def test_without_filters_there_is_no_mask():
    assert SHOP.allowed({}) is None


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"color": ["Blue"]}, "no attribute 'color'; did you mean 'colour'"),
        ({"colour": ["blue"]}, "colour 'blue'; did you mean 'Blue'"),
    ],
)
def test_the_error_for_an_unknown_attribute_or_value_suggests_the_closest(filters, message):
    with pytest.raises(UserError, match=message):
        SHOP.allowed(filters)


def test_products_are_looked_up_by_their_exact_id():
    assert SHOP.number("3") == 3
    assert SHOP.number("../3") is None and SHOP.number("") is None


def test_a_gallery_of_pictures_only_has_no_facets_and_no_captions():
    bare = Gallery(
        "shop", [Product(str(number), (), ()) for number in range(3)], lambda number: b"", lambda number: None
    )
    assert bare.facets() == [] and bare.captions == [""] * 3
