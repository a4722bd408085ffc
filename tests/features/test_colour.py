"""A product's colours are those a person would name, whatever light falls on it and wherever its pixels lie."""

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
    """Returns the picture of (rgb, number of pixels) and a mask of all of it."""
    pixels = np.concatenate([np.tile(np.array(rgb, np.uint8), (number, 1)) for rgb, number in rows])[None]
    return pixels, np.ones(pixels.shape[:2], np.bool_)


@pytest.fixture(scope="module")
def products():
    """Drawings with their pixels and where the product covers them."""
    drawings = [draw_product(12, index) for index in range(120)]
    return [(drawing, drawing.canvas.pixels.astype(np.uint8), drawing.canvas.covered >= 128) for drawing in drawings]


@st.composite
def masked_pictures(draw):
    pixels = draw(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12).map(lambda shape: (*shape, 3))))
    return pixels, draw(arrays(np.bool_, pixels.shape[:2]))


def test_the_dominant_colour_of_a_plain_drawn_product_is_the_one_its_catalogue_names(products):
    right = []
    for drawing, pixels, mask in products:
        named = drawing.row["baseColour"]
        parts = [number for number, (_, colour) in enumerate(drawing.canvas.parts) if colour.name == named]
        plain = drawing.truth["pattern"] == "Solid"
        if plain and np.isin(drawing.canvas.owner[mask], parts).mean() > 0.5:
            right.append(MERGED[colours(tally(pixels, mask)).names[0]] == MERGED[named])
    assert len(right) > 50
    assert np.mean(right) >= 0.95


def test_the_colour_of_nine_in_ten_drawn_products_is_among_their_three_whatever_their_pattern_and_parts(products):
    found = []
    for drawing, pixels, mask in products:
        found.append(MERGED[drawing.row["baseColour"]] in {MERGED[name] for name in colours(tally(pixels, mask)).names})
    assert np.mean(found) >= 0.9


def test_folds_and_lights_are_the_colour_of_the_cloth_they_lie_on():
    shades = [(np.array((190, 40, 50)) * light, 100) for light in (0.8, 0.88, 0.96, 1.04, 1.12)]
    found = colours(tally(*picture(*shades, ((250, 250, 250), 200))))
    assert [MERGED[name] for name in found.names[:2]] == ["Red", "White"]
    np.testing.assert_allclose(found.shares, [5 / 7, 2 / 7, 0], atol=1e-6)


def test_colours_of_one_lightness_are_not_shades_of_each_other():
    found = colours(tally(*picture(((200, 60, 60), 500), ((40, 120, 190), 300), ((60, 130, 60), 200))))
    assert [MERGED[name] for name in found.names] == ["Red", "Blue", "Green"]
    np.testing.assert_allclose(found.shares, [0.5, 0.3, 0.2], atol=1e-6)
    assert found.rgb.tolist() == [[200, 60, 60], [40, 120, 190], [60, 130, 60]]


def test_black_grey_and_white_are_three_colours():
    found = colours(tally(*picture(((250, 250, 250), 500), ((20, 20, 20), 300), ((128, 128, 128), 200))))
    assert [MERGED[name] for name in found.names] == ["White", "Black", "Grey"]


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_a_picture_of_one_colour_has_that_colour(rgb, k):
    found = colours(tally(*picture((rgb, 7))), k)
    assert found.rgb.tolist() == [list(rgb)] * k
    assert found.shares.tolist() == [1.0] + [0.0] * (k - 1)
    assert found.names == (colour_name(to_lab(np.array(rgb, np.uint8))),) * k


@given(masked_pictures(), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_shares_fall_and_sum_to_one_wherever_the_pixels_lie(masked, k, random):
    pixels, mask = masked
    found = colours(tally(pixels, mask), k)
    assert found.rgb.shape == found.lab.shape == (k, 3)
    assert found.rgb.dtype == np.uint8
    assert found.lab.dtype == found.shares.dtype == np.float32
    assert len(found.names) == k
    assert found.shares.sum() == pytest.approx(1)
    assert (found.shares >= 0).all() and (np.diff(found.shares) <= 0).all()
    order = list(range(mask.size))
    random.shuffle(order)
    moved = colours(tally(pixels.reshape(1, -1, 3)[:, order], mask.reshape(1, -1)[:, order]), k)
    for name in ("rgb", "lab", "shares"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(found, name))
    assert moved.names == found.names


def by_bits(pixels, bits):
    """Returns {bin: (pixels, sums of their channels)}, counted one by one."""
    found = {}
    for pixel in pixels.reshape(-1, 3).astype(int):
        code = sum(int(channel) >> 8 - bits << bits * place for place, channel in enumerate(pixel[::-1]))
        count, sums = found.get(code, (0, 0))
        found[code] = count + 1, sums + pixel
    return {code: (count, *map(int, sums)) for code, (count, sums) in found.items()}


@given(arrays(np.uint8, (9, 7, 3)))
@settings(deadline=None, max_examples=30)
def test_a_tally_is_what_counting_finds_in_either_width(pixels):
    fine = tally(pixels, np.ones(pixels.shape[:2], np.bool_))
    for bits, found in ((5, fine), (4, fine.coarser())):
        rows = zip(found.codes, found.counts, *found.sums.T, strict=True)
        assert {int(code): tuple(map(int, row)) for code, *row in rows} == by_bits(pixels, bits)


def test_only_the_product_counts_and_all_pixels_where_there_is_none():
    pixels, mask = picture(((30, 60, 160), 10), ((240, 220, 80), 30))
    assert colours(tally(pixels, mask)).names[0] == "Yellow"
    mask[:, 10:] = False
    assert colours(tally(pixels, mask)).names == ("Blue",) * 3
    none = np.zeros_like(mask)
    assert colours(tally(pixels, none)).names[0] == "Yellow"
    np.testing.assert_array_equal(colour_histogram(tally(pixels, none)), colour_histogram(tally(pixels, ~none)))


def test_a_photo_sized_noise_is_clustered_alike_each_time():
    pixels = np.random.default_rng(0).integers(0, 256, (300, 225, 3), dtype=np.uint8)
    mask = np.ones((300, 225), np.bool_)
    first, second = colours(tally(pixels, mask)), colours(tally(pixels, mask))
    np.testing.assert_array_equal(first.lab, second.lab)
    np.testing.assert_array_equal(first.shares, second.shares)


def test_lab_is_that_of_the_standard():
    # White, grey, red and blue of sRGB under D65, as published.
    rgb = np.array([(255, 255, 255), (119, 119, 119), (255, 0, 0), (0, 0, 255)], np.uint8)
    expected = [(100, 0, 0), (50.03, 0, 0), (53.24, 80.09, 67.20), (32.30, 79.19, -107.86)]
    np.testing.assert_allclose(to_lab(rgb), expected, atol=0.05)


def test_every_name_is_found_and_has_a_basic_one():
    assert set(MERGED) == set(PROTOTYPES) | {"Multi"}
    assert set(MERGED.values()) <= set(MERGED)
    assert all(MERGED[basic] == basic for basic in MERGED.values())
    for name, looks in PROTOTYPES.items():
        for look in looks:
            assert colour_name(to_lab(np.array([*bytes.fromhex(look)], np.uint8))) == name


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((255, 0, 0), "Red"), ((0, 0, 255), "Blue"), ((0, 0, 128), "Navy Blue"), ((255, 255, 0), "Yellow")],
)
def test_colours_that_no_cloth_has_are_named_too(rgb, name):
    assert colour_name(to_lab(np.array(rgb, np.uint8))) == name


def test_the_drawn_palette_is_named_as_it_is():
    for colour in CLOTH + METAL:
        assert MERGED[colour_name(to_lab(np.array(colour.rgb, np.uint8)))] == MERGED[colour.name], colour


@given(masked_pictures(), st.tuples(*[st.integers(1, 6)] * 3))
@settings(deadline=None, max_examples=60)
def test_a_histogram_sums_to_one_in_any_number_of_bins(masked, bins):
    histogram = colour_histogram(tally(*masked), bins)
    assert histogram.shape == (bins[0] * bins[1] * bins[2] + bins[2],)
    assert histogram.dtype == np.float32
    assert histogram.sum() == pytest.approx(1, abs=1e-5)


def test_a_histogram_knows_hues_from_greys():
    hues, saturations, values = BINS
    histogram = colour_histogram(
        tally(*picture(((255, 0, 5), 2), ((255, 5, 0), 2), ((0, 0, 0), 3), ((250, 250, 250), 1)))
    )
    filled = {int(index): round(float(histogram[index]), 3) for index in np.flatnonzero(histogram)}
    greys = hues * saturations * values
    red = (0 * saturations + saturations - 1) * values + values - 1
    assert filled == {red: 0.5, greys: 0.375, greys + values - 1: 0.125}


def test_wrong_shapes_and_numbers_are_mistakes():
    pixels, mask = picture(((1, 2, 3), 4))
    for bad in ((pixels[..., :2], mask), (pixels, mask[:, :2]), (pixels[:, :0], mask[:, :0]), (pixels / 255, mask)):
        with pytest.raises(ValueError, match="expected"):
            tally(*bad)
    with pytest.raises(ValueError, match="k = 0"):
        colours(tally(pixels, mask), 0)
    with pytest.raises(ValueError, match="at least 1"):
        colour_histogram(tally(pixels, mask), (0, 1, 1))
