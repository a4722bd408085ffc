"""The stems equal their plain definitions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.models.stem import ConvStem, PatchStem, convolve


def plain_convolution(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs have a special form")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 2, 2, 5), (2, 6, 10, 4), (1, 5, 7, 2)])
def test_the_cpu_form_of_a_convolution_has_the_value_and_gradients_of_the_plain_definition(shape, stride):
    ours, plain = partial(convolve, stride=stride), partial(plain_convolution, stride=stride)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(3, 3, shape[-1], 7)), jnp.float32)
    weights = jnp.asarray(random.normal(size=plain(x, kernel).shape), jnp.float32)

    def value_and_gradients(apply):
        return jax.value_and_grad(lambda x, k: jnp.sum(weights * apply(x, k)), argnums=(0, 1))(x, kernel)

    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        value_and_gradients(ours),
        value_and_gradients(plain),
    )


def test_a_patch_stem_equals_a_convolution_whose_stride_is_the_patch():
    stem = PatchStem(4, 6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 12, 3)), jnp.float32)
    kernel = stem.projection.kernel[...].reshape(4, 4, 3, 6)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
    )
    np.testing.assert_allclose(stem(x), expected.reshape(2, 9, 6), rtol=1e-4, atol=1e-5)


def test_a_convolutional_stem_returns_one_token_per_patch():
    for residual in (False, True):
        stem = ConvStem(8, 32, residual=residual, dtype=jnp.float32, rngs=nnx.Rngs(0))
        assert stem(jnp.ones((2, 24, 24, 3))).shape == (2, 9, 32)
        assert len(stem.layers) == (4 if residual else 3)
    with pytest.raises(
        ValueError, match="patch is 12, but a convolutional stem halves the picture: patch must be a power"
    ):
        ConvStem(12, 32, residual=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
