"""Views enlarge or mirror a picture, and their embeddings are averaged."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxclip.models.clip import normalise
from jaxclip.models.views import Views

RANDOM = np.random.default_rng(0)
PICTURES = jnp.asarray(RANDOM.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2))
WEIGHTS = RANDOM.standard_normal((64 * 64 * 3, 5)).astype(np.float32)


def encode(pixels):
    assert pixels.dtype == jnp.uint8
    return normalise(pixels.reshape(len(pixels), -1) / 255 @ WEIGHTS)


def test_with_one_view_of_the_whole_picture_the_embedding_is_unchanged():
    np.testing.assert_array_equal(Views().embed(encode, PICTURES), encode(PICTURES))
    np.testing.assert_array_equal(Views().render(PICTURES), PICTURES[None])


def test_an_enlarged_view_is_the_centre_of_the_picture_resized():
    (view,) = np.asarray(Views((2.0,)).render(PICTURES))
    for pixels, picture in zip(view, np.asarray(PICTURES), strict=True):
        expected = np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC, box=(16, 16, 48, 48)))
        # The border is left out: Pillow does not read pixels outside its box.
        difference = np.abs(pixels.astype(int) - expected)[4:-4, 4:-4]
        assert difference.mean() < 2 and np.percentile(difference, 90) <= 8


def test_the_embedding_is_the_normalised_mean_over_all_views():
    views = Views((1.0, 1.25), mirror=True)
    rendered = np.asarray(views.render(PICTURES))
    assert len(views) == len(rendered) == 4
    np.testing.assert_array_equal(rendered[2:], rendered[:2, :, :, ::-1])
    mean = np.mean([encode(jnp.asarray(view)) for view in rendered], axis=0)
    embedded = np.asarray(views.embed(encode, PICTURES))
    np.testing.assert_allclose(embedded, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert np.abs(embedded - encode(PICTURES)).max() > 0.01


@pytest.mark.parametrize("zooms", [(1.0,), (1.0, 1.1)])
def test_a_picture_and_its_mirror_image_have_the_same_embedding(zooms):
    views = Views(zooms, mirror=True)
    mirrored = views.embed(encode, PICTURES[:, :, ::-1])
    np.testing.assert_allclose(views.embed(encode, PICTURES), mirrored, atol=1e-4)  # a level of x.5 rounds to even
