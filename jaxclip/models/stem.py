"""From pixels to tokens: non-overlapping patches, or a few convolutions that end on the same grid."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxclip.models import compiler
from jaxclip.models.linear import Linear, contract


class PatchStem(nnx.Module):
    """One linear map per patch (Dosovitskiy et al. 2021), written as a matrix product over cut patches."""

    def __init__(self, patch: int, width: int, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.projection = Linear(patch * patch * 3, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.patch = patch

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        batch, size, _, channels = x.shape
        grid = size // self.patch
        x = x.reshape(batch, grid, self.patch, grid, self.patch, channels).swapaxes(2, 3)
        return self.projection(x.reshape(batch, grid * grid, -1))


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2, doubling in width, then one linear map (Xiao et al. 2021, arXiv:2106.14881).

    `residual` adds a 3x3 convolution at each size between the first and the last halving: small pictures keep their
    details (logos, dials) in fewer pixels than a token covers.
    """

    def __init__(self, patch: int, width: int, *, residual: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings:
            raise ValueError(f"a convolutional stem halves the picture: patch {patch} is no power of two")
        widths = [3] + [max(8, (3 * width // 4) >> (halvings - 1 - i)) for i in range(halvings)]
        layers: list[nnx.Module] = []
        for number, (before, after) in enumerate(zip(widths[:-1], widths[1:], strict=True), start=1):
            layers.append(Halving(before, after, dtype=dtype, rngs=rngs))
            if residual and 1 < number < halvings:
                layers.append(Residual(after, dtype=dtype, rngs=rngs))
        self.layers = nnx.List(layers)
        self.projection = Linear(widths[-1], width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        for layer in self.layers:
            x = layer(x)
        return self.projection(x.reshape(x.shape[0], -1, x.shape[-1]))


class Halving(nnx.Module):
    """A 3x3 convolution of stride 2, normalised over channels, then GELU."""

    def __init__(self, before: int, after: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, before, after)))
        self.norm = nnx.LayerNorm(after, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S/2 S/2 D"]:
        x = convolve(x, self.kernel[...].astype(x.dtype), stride=2)
        return jax.nn.gelu(self.norm(x), approximate=True)


class Residual(nnx.Module):
    """The input and half of its 3x3 convolution, normalised before and passed through GELU."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, width, width)))

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S S C"]:
        added = convolve(self.norm(x), self.kernel[...].astype(x.dtype), stride=1)
        return x + 0.5 * jax.nn.gelu(added, approximate=True)


def convolve(x: Float[Array, "B S S C"], kernel: Float[Array, "3 3 C D"], *, stride: int) -> Float[Array, "B T T D"]:
    """Returns the 3x3 convolution of this stride with one pixel of zero padding on each side, T = ceil(S / stride).

    On CPU it is a matrix product over nine shifted copies: XLA's own backward pass of a convolution takes up to three
    times as long there.
    """
    if not compiler.on_cpu():
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1], x.shape[2]
    shifted = [
        padded[:, row : row + height : stride, column : column + width : stride]
        for row in range(3)
        for column in range(3)
    ]
    return contract(jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1]))
