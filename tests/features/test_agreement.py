"""Agreement counts what a reader of the table would count by hand."""

import numpy as np

from jaxclip.features import agreement


def test_counts_by_name_by_basic_term_and_among_three():
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
    found = agreement.compare(named, stored)
    assert (found.compared, found.left_out, found.exact, found.top1, found.top3) == (4, 3, 1, 2, 3)
    place = {name: number for number, name in enumerate(found.names)}
    wanted = np.zeros_like(found.confusion)
    for row, column in (("Blue", "Blue"), ("Red", "Red"), ("Red", "Black"), ("White", "Black")):
        wanted[place[row], place[column]] += 1
    np.testing.assert_array_equal(found.confusion, wanted)


def test_the_attribute_of_colours_is_found_by_its_values():
    shirts = [{"season": "Summer", "shade": "Red", "lining": "Blue"}, {"shade": "Teal"}, {"shade": "unlike any"}]
    assert agreement.colour_attribute(shirts) == "shade"
    assert (
        agreement.colour_attribute([{"season": "Summer"}, {"mood": "Blue"}, {"mood": "sad"}, {"mood": "gay"}]) is None
    )
    assert agreement.colour_attribute([]) is None
