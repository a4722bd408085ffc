"""Stems, which turn pixels into tokens: a linear map of each patch, or convolutions with the same output grid."""

import itertools

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxclip.models.linear import Linear
from jaxclip.models.recompute import LayerNorm
from jaxclip.models.transformer import activate


class PatchStem(nnx.Module):
    """One linear map per patch (Dosovitskiy et al. 2021), computed as a matrix product over the patches' pixels."""

    def __init__(self, patch: int, width: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.projection = Linear(patch * patch * 3, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.patch = patch

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        batch, size, _, channels = x.shape
        grid = size // self.patch
        x = x.reshape(batch, grid, self.patch, grid, self.patch, channels).swapaxes(2, 3)
        return self.projection(x.reshape(batch, grid * grid, -1))


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2, each with twice the channels of the one before, then one linear map per token.

    From Xiao et al. 2021, arXiv:2106.14881. Each convolution has at least 8 channels. `residual` adds a residual 3x3
    convolution after every halving except the first and the last, to preserve details that are smaller than a token
    (logos, dials).
    """

    def __init__(self, patch: int, width: int, *, residual: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings:
            raise ValueError(
                f"patch is {patch}, but a convolutional stem halves the picture: patch must be a power of two"
            )
        widths = [3] + [max(8, (3 * width // 4) >> (halvings - 1 - i)) for i in range(halvings)]
        layers: list[nnx.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), start=1):
            layers.append(Halving(inputs, outputs, dtype=dtype, rngs=rngs))
            if residual and 1 < number < halvings:
                layers.append(Residual(outputs, dtype=dtype, rngs=rngs))
        self.layers = nnx.List(layers)
        self.projection = Linear(widths[-1], width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        for layer in self.layers:
            x = layer(x)
        return self.projection(x.reshape(x.shape[0], -1, x.shape[-1]))


class Halving(nnx.Module):
    """A 3x3 convolution of stride 2, a layer norm over the channels, then GELU."""

    def __init__(self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, inputs, outputs)))
        self.norm = LayerNorm(outputs, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S/2 S/2 D"]:
        x = convolve(x, self.kernel[...].astype(x.dtype), stride=2)
        return activate(self.norm(x), "gelu_tanh")


class Residual(nnx.Module):
    """x + 0.5 * GELU(convolution(norm(x))), with a 3x3 convolution of stride 1."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, width, width)))

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S S C"]:
        convolved = convolve(self.norm(x), self.kernel[...].astype(x.dtype), stride=1)
        return x + 0.5 * activate(convolved, "gelu_tanh")


def convolve(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], *, stride: int) -> Float[Array, "B T U D"]:
    """Returns the 3x3 convolution of stride 1 or 2 with one pixel of zero padding on each side.

    T = ceil(H / stride), U = ceil(W / stride).
    """
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout)
