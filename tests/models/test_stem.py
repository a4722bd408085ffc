"""The stems equal their plain definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxclip.models.stem import ConvStem, PatchStem


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
