"""From pixels to tokens: non-overlapping patches, or a few convolutions that end on the same grid."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class PatchStem(nnx.Module):
    """One linear map per patch (Dosovitskiy et al. 2021), written as a matrix product over cut patches."""

    def __init__(self, patch: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.projection = nnx.Linear(patch * patch * 3, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.patch = patch

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        batch, size, _, channels = x.shape
        grid = size // self.patch
        x = x.reshape(batch, grid, self.patch, grid, self.patch, channels).swapaxes(2, 3)
        return self.projection(x.reshape(batch, grid * grid, -1))


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2, doubling in width, then one linear map (Xiao et al. 2021, arXiv:2106.14881)."""

    def __init__(self, patch: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings:
            raise ValueError(f"a convolutional stem halves the picture: patch {patch} is no power of two")
        widths = [3] + [max(8, (3 * width // 4) >> (halvings - 1 - i)) for i in range(halvings)]
        self.halvings = nnx.List(
            Halving(before, after, dtype=dtype, rngs=rngs)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.projection = nnx.Linear(widths[-1], width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        for halving in self.halvings:
            x = halving(x)
        return self.projection(x.reshape(len(x), -1, x.shape[-1]))


class Halving(nnx.Module):
    """A 3x3 convolution of stride 2, normalised over channels, then GELU."""

    def __init__(self, before: int, after: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, before, after)))
        self.norm = nnx.LayerNorm(after, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S/2 S/2 D"]:
        return jax.nn.gelu(self.norm(halve(x, self.kernel[...].astype(x.dtype))), approximate=True)


def halve(x: Float[Array, "B S S C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B S/2 S/2 D"]:
    """Returns the convolution of stride 2 with one pixel of zero padding on each side.

    On CPU it is a matrix product over nine shifted copies: XLA's own backward pass of a convolution takes up to three
    times as long there.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2
    shifted = [
        padded[:, row : row + 2 * height - 1 : 2, column : column + 2 * width - 1 : 2]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
