"""Views of a picture: what each shows, and what is made of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxclip.models.clip import unit
from jaxclip.models.views import Views

RANDOM = np.random.default_rng(0)
PICTURES = jnp.asarray(RANDOM.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2))
WEIGHTS = RANDOM.standard_normal((64 * 64 * 3, 5)).astype(np.float32)


def encode(pixels):
    assert pixels.dtype == jnp.uint8
    return unit(pixels.reshape(len(pixels), -1) / 255 @ WEIGHTS)


def test_one_view_of_the_whole_is_the_encoder_itself():
    np.testing.assert_array_equal(Views().embed(encode, PICTURES), encode(PICTURES))
    np.testing.assert_array_equal(Views().of(PICTURES), PICTURES[None])


def test_an_enlarged_view_is_the_centre_resized():
    (view,) = np.asarray(Views((2.0,)).of(PICTURES))
    for seen, picture in zip(view, np.asarray(PICTURES), strict=True):
        wanted = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC, box=(16, 16, 48, 48)))
        inside = np.abs(seen.astype(int) - wanted)[4:-4, 4:-4]  # Pillow sees nothing beyond its box
        assert inside.mean() < 2 and np.percentile(inside, 90) <= 8


def test_a_vector_is_the_unit_mean_over_all_views():
    views = Views((1.0, 1.25), mirror=True)
    shown = np.asarray(views.of(PICTURES))
    assert len(views) == len(shown) == 4
    np.testing.assert_array_equal(shown[2:], shown[:2, :, :, ::-1])
    mean = np.mean([encode(jnp.asarray(view)) for view in shown], axis=0)
    found = np.asarray(views.embed(encode, PICTURES))
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert np.abs(found - encode(PICTURES)).max() > 0.01


@pytest.mark.parametrize("zooms", [(1.0,), (1.0, 1.1)])
def test_a_picture_and_its_mirror_image_have_the_same_vector(zooms):
    views = Views(zooms, mirror=True)
    mirrored = views.embed(encode, PICTURES[:, :, ::-1])
    np.testing.assert_allclose(views.embed(encode, PICTURES), mirrored, atol=1e-4)  # levels of .5 round to even
