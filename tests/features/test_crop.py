"""Policies select crops among detections, labels are compared by words, and a cut stays inside the picture."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.errors import UserError
from jaxclip.features.crop import WHOLE, check, choose, cut, pad, same_kind
from jaxclip.features.detect import NONE, Detections

DETECTIONS = Detections.of(
    [[0.1, 0.1, 0.3, 0.3], [0.0, 0.2, 0.9, 0.9], [0.4, 0.4, 0.6, 0.8]], [0.9, 0.5, 0.7], ["watch", "handbag", "strap"]
)
SHARE = st.floats(-0.5, 1.5)


def labels(policy, **options):
    return [crop.label for crop in choose(DETECTIONS, policy, **options)]


def test_each_policy_selects_its_boxes():
    assert labels("confident") == ["watch"]
    assert labels("largest") == ["handbag"]
    assert labels("category", category="Handbags") == ["handbag"]
    assert labels("category", category="Shoes") == labels("category") == ["watch"]
    assert labels("all:2") == ["watch", "strap"]
    assert labels("all:10") == ["watch", "strap", "handbag"], "parts keep their own labels"


@pytest.mark.parametrize("policy", ["largest", "confident", "category", "all:3"])
def test_if_nothing_is_detected_the_crop_is_the_whole_picture_and_marked_as_fallback(policy):
    assert choose(NONE, policy, category="Shoes", padding=0.1) == (WHOLE,)
    assert WHOLE.fell_back and WHOLE.box == (0, 0, 1, 1)
    assert not any(crop.fell_back for crop in choose(DETECTIONS, policy))


@pytest.mark.parametrize(
    ("label", "category"),
    [
        ("T-shirt", "Tshirts"),
        ("shoe", "Sports Shoes"),
        ("Casual Shoes", "shoes"),
        ("watch", "Watches"),
        ("DRESS", "Dresses"),
        ("short_sleeve_top", "Tops"),
        ("sunglasses", "Sunglasses"),
        ("box", "Boxes"),
        ("ties", "Tie"),
    ],
)
def test_a_label_matches_a_category_if_one_contains_all_words_of_the_other(label, category):
    assert same_kind(label, category) and same_kind(category, label)


@pytest.mark.parametrize(
    ("label", "category"),
    [("sports ball", "Sports Shoes"), ("", "Shoes"), ("tie", ""), ("belt", "Belt-bags"), ("t", "s")],
)
def test_one_common_word_is_not_a_match(label, category):
    assert not same_kind(label, category)


def test_padding_is_a_share_of_the_box_and_is_clipped_to_the_picture():
    (crop,) = choose(DETECTIONS, "confident", padding=0.25)
    assert crop.box == pytest.approx((0.05, 0.05, 0.35, 0.35))
    assert pad((0.0, 0.2, 0.9, 0.9), 0.5) == (0, 0, 1, 1)


@pytest.mark.parametrize("policy", ["", "biggest", "all", "all:", "all:0", "all:-1", "all:x", "largest:2", "all:1.5"])
def test_an_unknown_policy_is_an_error(policy):
    with pytest.raises(UserError, match="crop policy"):
        choose(NONE, policy)


@pytest.mark.parametrize("padding", [-0.1, math.nan, math.inf])
def test_a_negative_or_infinite_padding_is_an_error(padding):
    with pytest.raises(UserError, match="padding"):
        check("largest", padding)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.tuples(SHARE, SHARE, SHARE, SHARE))
def test_a_cut_is_never_empty_and_never_outside_the_picture(height, width, box):
    image = np.arange(height * width).reshape(height, width)
    part = cut(image, box)
    assert part.size and np.isin(part, image).all()


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_cutting_a_box_of_whole_pixels_returns_exactly_these_pixels(width, data):
    first = data.draw(st.integers(0, width - 1))
    last = data.draw(st.integers(first + 1, width))
    box = np.array([first / width, 0, last / width, 1], np.float32)
    np.testing.assert_array_equal(cut(np.arange(width)[None], box)[0], np.arange(first, last))


def test_a_box_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="nan"):
        cut(np.zeros((2, 2, 3), np.uint8), (0, 0, math.nan, 1))
