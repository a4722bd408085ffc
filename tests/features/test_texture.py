"""Texture distinguishes plain, striped and dotted cloth of any size and colour, and ignores the outline."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jaxclip.catalog.drawn.canvas import Canvas, Placement
from jaxclip.catalog.drawn.outlines import rectangle
from jaxclip.catalog.drawn.palette import RGB, PaletteColour
from jaxclip.catalog.drawn.patterns import SOLID, Cloth
from jaxclip.features.texture import NAMES, texture

GROUNDS = [
    PaletteColour("Navy Blue", RGB(36, 50, 98)),
    PaletteColour("Maroon", RGB(122, 30, 52)),
    PaletteColour("Green", RGB(56, 148, 84)),
]
SECONDS = [
    PaletteColour("White", RGB(247, 246, 243)),
    PaletteColour("Yellow", RGB(246, 206, 72)),
    PaletteColour("Pink", RGB(244, 150, 176)),
]


def cloth(pattern, ground=GROUNDS[0], second=SECONDS[0], size=100, height=160):
    """Returns a picture of a piece of drawn cloth, and its mask."""
    canvas = Canvas(np.full((height, height * 3 // 4, 3), 255, np.int32), Placement())
    canvas.part("body", [rectangle(-400, -500, 400, 500)], ground, Cloth(pattern, second, size))
    return canvas.pixels.astype(np.uint8), canvas.covered >= 128


def measure(name, *masked_picture):
    return float(texture(*masked_picture)[NAMES.index(name)])


@pytest.fixture(scope="module")
def cloths():
    """Returns the textures of each pattern, in nine pairs of colours and two sizes."""
    return {
        pattern: np.stack(
            [
                texture(*cloth(pattern, ground, second, size))
                for ground in GROUNDS
                for second in SECONDS
                for size in (90, 115)
            ]
        )
        for pattern in (SOLID, "Striped", "Vertical Striped", "Polka Dot")
    }


def test_the_nearest_neighbour_of_a_cloth_has_the_same_pattern(cloths):
    rows = np.concatenate(list(cloths.values()))
    labels = np.repeat(list(cloths), [len(rows) for rows in cloths.values()])
    scaled = (rows - rows.mean(axis=0)) / (rows.std(axis=0) + 1e-6)
    distance = np.linalg.norm(scaled[:, None] - scaled[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).mean() >= 0.95


def test_stripes_have_contrast_only_across_their_direction(cloths):
    across, down = NAMES.index("contrast 6 across"), NAMES.index("contrast 6 down")
    assert (cloths["Striped"][:, down] > 5 * cloths["Striped"][:, across]).all()
    assert (cloths["Vertical Striped"][:, across] > 5 * cloths["Vertical Striped"][:, down]).all()
    dots = cloths["Polka Dot"]
    assert (np.maximum(dots[:, across], dots[:, down]) < 3 * np.minimum(dots[:, across], dots[:, down])).all()
    for pattern in ("Striped", "Vertical Striped", "Polka Dot"):
        contrast = np.maximum(cloths[pattern][:, across], cloths[pattern][:, down])
        assert contrast.min() > 4 * cloths[SOLID][:, [across, down]].max()


def test_a_picture_of_twice_the_size_has_nearly_the_same_texture():
    small, large = (texture(*cloth("Polka Dot", height=height)) for height in (200, 400))
    np.testing.assert_allclose(small[:10], large[:10], atol=0.08)
    np.testing.assert_allclose(small[10:], large[10:], rtol=0.25, atol=0.05)


def test_a_margin_outside_the_mask_does_not_change_the_texture():
    pixels, mask = cloth("Striped")
    expected = texture(pixels, mask)
    padded = np.pad(pixels, ((20, 9), (31, 4), (0, 0)), constant_values=9)
    np.testing.assert_array_equal(texture(padded, np.pad(mask, ((20, 9), (31, 4)))), expected)


def test_plain_cloth_has_no_contrast_and_full_homogeneity():
    pixels, mask = np.full((30, 20, 3), 90, np.uint8), np.ones((30, 20), np.bool_)
    pixels[:, 12:] = 250
    mask[:, 12:] = False
    assert measure("lbp 8", pixels, mask) == 1
    assert texture(pixels, mask)[10:].tolist() == [0] * 4 + [1] * 12


@st.composite
def masked_pictures(draw):
    pixels = draw(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40).map(lambda shape: (*shape, 3))))
    return pixels, draw(arrays(np.bool_, pixels.shape[:2]))


@given(masked_pictures())
@settings(deadline=None, max_examples=50)
def test_any_picture_has_a_texture_of_finite_numbers(masked):
    values = texture(*masked)
    assert values.shape == (len(NAMES),)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert values[:10].sum() == pytest.approx(1)
    np.testing.assert_array_equal(texture(*masked), values)


def test_a_single_pixel_an_empty_mask_and_a_sparse_mask_have_a_texture():
    pixel = np.full((1, 1, 3), 7, np.uint8)
    assert np.isfinite(texture(pixel, np.ones((1, 1), np.bool_))).all()
    pixels, mask = cloth("Striped")
    np.testing.assert_array_equal(texture(pixels, np.zeros_like(mask)), texture(pixels, np.ones_like(mask)))
    sparse = np.zeros((600, 500), np.bool_)
    sparse[0, 0] = sparse[-1, -1] = True
    assert np.isfinite(texture(np.zeros((600, 500, 3), np.uint8), sparse)).all()


def test_wrong_shapes_are_errors():
    pixels, mask = cloth(SOLID)
    for bad in ((pixels[..., 0], mask), (pixels, mask[1:]), (pixels[:0], mask[:0])):
        with pytest.raises(ValueError, match="expected"):
            texture(*bad)
