"""A product's colours have the names that a person would give, in any light and for any order of the pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jaxclip.catalog.drawn.palette import CLOTH, METAL
from jaxclip.catalog.drawn.stock import draw_product
from jaxclip.features.colour import BINS, colour_histogram, colour_name, colours, tally, to_lab
from jaxclip.features.palette import MERGED, PROTOTYPES


def picture(*rows):
    """Returns a picture with the given number of pixels of each colour, and a mask of all pixels."""
    pixels = np.concatenate([np.tile(np.array(rgb, np.uint8), (number, 1)) for rgb, number in rows])[None]
    return pixels, np.ones(pixels.shape[:2], np.bool_)


@pytest.fixture(scope="module")
def products():
    """Returns drawings, each with its pixels and the mask of its product."""
    drawings = [draw_product(12, index) for index in range(120)]
    return [(drawing, drawing.canvas.pixels.astype(np.uint8), drawing.canvas.covered >= 128) for drawing in drawings]


@st.composite
def masked_pictures(draw):
    pixels = draw(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12).map(lambda shape: (*shape, 3))))
    return pixels, draw(arrays(np.bool_, pixels.shape[:2]))


def test_the_dominant_colour_of_a_plain_drawn_product_is_that_of_the_catalogue(products):
    correct = []
    for drawing, pixels, mask in products:
        named = drawing.row["baseColour"]
        parts = [number for number, (_, colour) in enumerate(drawing.canvas.parts) if colour.name == named]
        plain = drawing.truth["pattern"] == "Solid"
        if plain and np.isin(drawing.canvas.owner[mask], parts).mean() > 0.5:
            correct.append(MERGED[colours(tally(pixels, mask)).names[0]] == MERGED[named])
    assert len(correct) > 50
    assert np.mean(correct) >= 0.95


def test_nine_in_ten_drawn_products_of_any_pattern_have_their_catalogue_colour_among_three(products):
    correct = []
    for drawing, pixels, mask in products:
        names = colours(tally(pixels, mask)).names
        correct.append(MERGED[drawing.row["baseColour"]] in {MERGED[name] for name in names})
    assert np.mean(correct) >= 0.9


def test_shadows_and_highlights_count_as_the_colour_of_their_cloth():
    shades = [(np.array((190, 40, 50)) * light, 100) for light in (0.8, 0.88, 0.96, 1.04, 1.12)]
    result = colours(tally(*picture(*shades, ((250, 250, 250), 200))))
    assert [MERGED[name] for name in result.names[:2]] == ["Red", "White"]
    np.testing.assert_allclose(result.shares, [5 / 7, 2 / 7, 0], atol=1e-6)


def test_colours_of_equal_lightness_are_not_merged():
    result = colours(tally(*picture(((200, 60, 60), 500), ((40, 120, 190), 300), ((60, 130, 60), 200))))
    assert [MERGED[name] for name in result.names] == ["Red", "Blue", "Green"]
    np.testing.assert_allclose(result.shares, [0.5, 0.3, 0.2], atol=1e-6)
    assert result.rgb.tolist() == [[200, 60, 60], [40, 120, 190], [60, 130, 60]]


def test_black_grey_and_white_are_three_colours():
    result = colours(tally(*picture(((250, 250, 250), 500), ((20, 20, 20), 300), ((128, 128, 128), 200))))
    assert [MERGED[name] for name in result.names] == ["White", "Black", "Grey"]


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_a_picture_of_one_colour_has_exactly_this_colour(rgb, k):
    result = colours(tally(*picture((rgb, 7))), k)
    assert result.rgb.tolist() == [list(rgb)] * k
    assert result.shares.tolist() == [1.0] + [0.0] * (k - 1)
    assert result.names == (colour_name(to_lab(np.array(rgb, np.uint8))),) * k


@given(masked_pictures(), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_shares_descend_and_sum_to_one_and_do_not_depend_on_pixel_positions(masked, k, random):
    pixels, mask = masked
    result = colours(tally(pixels, mask), k)
    assert result.rgb.shape == result.lab.shape == (k, 3)
    assert result.rgb.dtype == np.uint8
    assert result.lab.dtype == result.shares.dtype == np.float32
    assert len(result.names) == k
    assert result.shares.sum() == pytest.approx(1)
    assert (result.shares >= 0).all() and (np.diff(result.shares) <= 0).all()
    order = list(range(mask.size))
    random.shuffle(order)
    shuffled = colours(tally(pixels.reshape(1, -1, 3)[:, order], mask.reshape(1, -1)[:, order]), k)
    for name in ("rgb", "lab", "shares"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(result, name))
    assert shuffled.names == result.names


def count_pixels(pixels, bits):
    """Returns {code: (number of pixels, sums of their channels)}, counted pixel by pixel."""
    bins = {}
    for pixel in pixels.reshape(-1, 3).astype(int):
        code = sum(int(channel) >> 8 - bits << bits * place for place, channel in enumerate(pixel[::-1]))
        count, sums = bins.get(code, (0, 0))
        bins[code] = count + 1, sums + pixel
    return {code: (count, *map(int, sums)) for code, (count, sums) in bins.items()}


@given(arrays(np.uint8, (9, 7, 3)))
@settings(deadline=None, max_examples=30)
def test_a_tally_equals_counting_pixel_by_pixel_at_either_resolution(pixels):
    fine = tally(pixels, np.ones(pixels.shape[:2], np.bool_))
    for bits, histogram in ((5, fine), (4, fine.coarsen())):
        rows = zip(histogram.codes, histogram.counts, *histogram.sums.T, strict=True)
        assert {int(code): tuple(map(int, row)) for code, *row in rows} == count_pixels(pixels, bits)


def test_only_pixels_in_the_mask_count_or_all_pixels_if_it_is_empty():
    pixels, mask = picture(((30, 60, 160), 10), ((240, 220, 80), 30))
    assert colours(tally(pixels, mask)).names[0] == "Yellow"
    mask[:, 10:] = False
    assert colours(tally(pixels, mask)).names == ("Blue",) * 3
    empty = np.zeros_like(mask)
    assert colours(tally(pixels, empty)).names[0] == "Yellow"
    np.testing.assert_array_equal(colour_histogram(tally(pixels, empty)), colour_histogram(tally(pixels, ~empty)))


def test_the_colours_of_noise_are_the_same_each_time():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 225, 3), dtype=np.uint8)
    mask = np.ones((300, 225), np.bool_)
    first, second = colours(tally(pixels, mask)), colours(tally(pixels, mask))
    np.testing.assert_array_equal(first.lab, second.lab)
    np.testing.assert_array_equal(first.shares, second.shares)


def test_lab_equals_published_values():
    # White, grey, red and blue of sRGB under D65.
    rgb = np.array([(255, 255, 255), (119, 119, 119), (255, 0, 0), (0, 0, 255)], np.uint8)
    expected = [(100, 0, 0), (50.03, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86)]
    np.testing.assert_allclose(to_lab(rgb), expected, atol=0.05)


def test_every_name_has_a_basic_term_and_is_the_name_of_its_prototypes():
    assert set(MERGED) == set(PROTOTYPES) | {"Multi"}
    assert set(MERGED.values()) <= set(MERGED)
    assert all(MERGED[basic] == basic for basic in MERGED.values())
    for name, prototypes in PROTOTYPES.items():
        for rgb in prototypes:
            assert colour_name(to_lab(np.array([*bytes.fromhex(rgb)], np.uint8))) == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((255, 0, 0), "Red"), ((0, 0, 255), "Blue"), ((0, 0, 128), "Navy Blue"), ((255, 255, 0), "Yellow")],
)
def test_saturated_colours_that_no_cloth_has_are_named_correctly(rgb, name):
    assert colour_name(to_lab(np.array(rgb, np.uint8))) == name


def test_the_colours_of_drawn_products_have_the_right_basic_terms():
    for colour in CLOTH + METAL:
        assert MERGED[colour_name(to_lab(np.array(colour.rgb, np.uint8)))] == MERGED[colour.name], colour


@given(masked_pictures(), st.tuples(*[st.integers(1, 6)] * 3))
@settings(deadline=None, max_examples=60)
def test_a_histogram_sums_to_one_for_any_number_of_bins(masked, bins):
    histogram = colour_histogram(tally(*masked), bins)
    assert histogram.shape == (bins[0] * bins[1] * bins[2] + bins[2],)
    assert histogram.dtype == np.float32
    assert histogram.sum() == pytest.approx(1, abs=1e-5)


def test_a_histogram_counts_hues_and_greys_in_separate_bins():
    hues, saturations, values = BINS
    histogram = colour_histogram(
        tally(*picture(((255, 0, 5), 2), ((255, 5, 0), 2), ((0, 0, 0), 3), ((250, 250, 250), 1)))
    )
    filled = {int(index): round(float(histogram[index]), 3) for index in np.flatnonzero(histogram)}
    greys = hues * saturations * values
    red = (0 * saturations + saturations - 1) * values + values - 1
    assert filled == {red: 0.5, greys: 0.375, greys + values - 1: 0.125}


def test_wrong_shapes_dtypes_and_numbers_are_errors():
    pixels, mask = picture(((1, 2, 3), 4))
    for bad in ((pixels[..., :2], mask), (pixels, mask[:, :2]), (pixels[:, :0], mask[:, :0]), (pixels / 255, mask)):
        with pytest.raises(ValueError, match="expected"):
            tally(*bad)
    with pytest.raises(ValueError, match="k = 0"):
        colours(tally(pixels, mask), 0)
    with pytest.raises(ValueError, match="at least 1"):
        colour_histogram(tally(pixels, mask), (0, 1, 1))
