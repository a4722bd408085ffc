"""Agreement counts are those that a person would count by hand."""

import numpy as np

from jaxclip.features import agreement


def test_products_are_counted_by_name_by_basic_term_and_by_three_colours():
    named = ["Navy Blue", "red", "Maroon", "Multi", "", "no colour", "White"]
    stored = [
        ["Blue", "Black"],
        ["Red"],
        ["Black", "White", "Red"],
        ["Red"],
        ["Red"],
        ["Red"],
        ["Black", "Red", "Grey", "White"],
    ]
    result = agreement.compare(named, stored)
    assert (result.compared, result.left_out, result.exact, result.top1, result.top3) == (4, 3, 1, 2, 3)
    index = {name: number for number, name in enumerate(result.names)}
    expected = np.zeros_like(result.confusion)
    for row, column in (("Blue", "Blue"), ("Red", "Red"), ("Red", "Black"), ("White", "Black")):
        expected[index[row], index[column]] += 1
    np.testing.assert_array_equal(result.confusion, expected)


def test_the_colour_attribute_is_recognised_by_its_values():
    shirts = [{"season": "Summer", "shade": "Red", "lining": "Blue"}, {"shade": "Teal"}, {"shade": "unlike any"}]
    assert agreement.colour_attribute(shirts) == "shade"
    assert (
        agreement.colour_attribute([{"season": "Summer"}, {"mood": "Blue"}, {"mood": "sad"}, {"mood": "gay"}]) is None
    )
    assert agreement.colour_attribute([]) is None
