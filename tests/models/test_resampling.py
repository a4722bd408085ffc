"""Pictures are scaled on the device to the same pixels as by Pillow."""

from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from jaxclip.models import resampling

CANVAS = 80
SHAPES = [(80, 80), (70, 51), (33, 80), (32, 32), (20, 31), (1, 1), (1, 80), (80, 3)]


def canvases(pictures):
    pixels = np.full((len(pictures), CANVAS, CANVAS, 3), 255, np.uint8)  # pixels outside a picture must be ignored
    for canvas, picture in zip(pixels, pictures, strict=True):
        canvas[: picture.shape[0], : picture.shape[1]] = picture
    return pixels, np.asarray([picture.shape[:2] for picture in pictures], np.int32)


def random_pictures(low, high):
    random = np.random.default_rng(0)
    return [random.integers(low, high, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def scale_with_pillow(picture, size, name):
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling[name.upper()]))


@pytest.mark.parametrize("name", resampling.FILTERS)
@pytest.mark.parametrize("size", [32, 80, 100])
def test_pictures_of_any_shape_are_scaled_to_nearly_the_same_pixels_as_by_pillow(name, size):
    # Levels 80 to 175 cannot overshoot black or white. The differences that remain come from ties in rounding, and from
    # shapes whose columns newer versions of Pillow scale first.
    pictures = random_pictures(80, 176)
    scaled = np.asarray(jax.jit(partial(resampling.scale, size=size, filter=name))(*canvases(pictures)))
    assert scaled.dtype == np.uint8 and scaled.shape == (len(SHAPES), size, size, 3)
    for picture, pixels in zip(pictures, scaled.astype(int), strict=True):
        difference = np.abs(pixels - scale_with_pillow(picture, size, name))
        assert difference.max() <= 2 and difference.mean() < 0.25, picture.shape


@pytest.mark.parametrize("axis", [0, 1])
def test_overshoot_beyond_black_and_white_is_clipped(axis):
    edge = np.zeros((64, 64, 3), np.uint8)
    np.moveaxis(edge, axis, 0)[31:50] = 255
    scaled = np.asarray(resampling.scale(*canvases([edge]), 48, "bicubic"))[0].astype(int)
    assert np.abs(scaled - scale_with_pillow(edge, 48, "bicubic")).max() <= 1


def test_a_picture_that_has_the_target_size_is_unchanged():
    (picture,) = (picture for picture in random_pictures(0, 256) if picture.shape[:2] == (32, 32))
    scaled = resampling.scale(*canvases([picture]), 32, "bicubic")
    np.testing.assert_array_equal(scaled[0], picture)
