"""Devices scale pictures as Pillow does."""

from functools import partial

import jax
import numpy as np
import pytest
from PIL import Image

from jaxclip.models import resampling

CANVAS = 80
SHAPES = [(80, 80), (70, 51), (33, 80), (32, 32), (20, 31), (1, 1), (1, 80), (80, 3)]


def canvases(pictures):
    found = np.full((len(pictures), CANVAS, CANVAS, 3), 255, np.uint8)  # what is outside must not matter
    for canvas, picture in zip(found, pictures, strict=True):
        canvas[: picture.shape[0], : picture.shape[1]] = picture
    return found, np.asarray([picture.shape[:2] for picture in pictures], np.int32)


def drawn(low, high):
    random = np.random.default_rng(0)
    return [random.integers(low, high, (*shape, 3), dtype=np.uint8) for shape in SHAPES]


def by_pillow(picture, size, name):
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling[name.upper()]))


@pytest.mark.parametrize("name", resampling.FILTERS)
@pytest.mark.parametrize("size", [32, 80, 100])
def test_pictures_of_all_shapes_are_scaled_to_the_pixels_of_pillow(name, size):
    # Nothing overshoots black or white. Differences are ties, and shapes whose columns newer Pillows scale first.
    pictures = drawn(80, 176)
    found = np.asarray(jax.jit(partial(resampling.scale, size=size, filter=name))(*canvases(pictures)))
    assert found.dtype == np.uint8 and found.shape == (len(SHAPES), size, size, 3)
    for picture, one in zip(pictures, found.astype(int), strict=True):
        difference = np.abs(one - by_pillow(picture, size, name))
        assert difference.max() <= 2 and difference.mean() < 0.25, picture.shape


@pytest.mark.parametrize("axis", [0, 1])
def test_overshoot_beyond_black_and_white_is_cut_off(axis):
    edge = np.zeros((64, 64, 3), np.uint8)
    np.moveaxis(edge, axis, 0)[31:50] = 255
    found = np.asarray(resampling.scale(*canvases([edge]), 48, "bicubic"))[0].astype(int)
    assert np.abs(found - by_pillow(edge, 48, "bicubic")).max() <= 1


def test_a_picture_of_the_wanted_size_stays_as_it_is():
    (picture,) = (picture for picture in drawn(0, 256) if picture.shape[:2] == (32, 32))
    found = resampling.scale(*canvases([picture]), 32, "bicubic")
    np.testing.assert_array_equal(found[0], picture)
