"""From pixels to tokens: non-overlapping patches, or a few convolutions that end on the same grid."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxclip.models.linear import Linear
from jaxclip.models.transformer import ACTIVATIONS
from jaxclip.runtime import compiler


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
        return ACTIVATIONS["gelu_tanh"](self.norm(x))


class Residual(nnx.Module):
    """The input and half of its 3x3 convolution, normalised before and passed through GELU."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (3, 3, width, width)))

    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B S S C"]:
        added = convolve(self.norm(x), self.kernel[...].astype(x.dtype), stride=1)
        return x + 0.5 * ACTIVATIONS["gelu_tanh"](added)


def convolve(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], *, stride: int) -> Float[Array, "B T U D"]:
    """Returns the 3x3 convolution of stride 1 or 2 with one pixel of zero padding on each side.

    T = ceil(H / stride), U = ceil(W / stride).
    """
    if not compiler.on_cpu():
        return _convolution(x, kernel, stride)
    _, height, width, _ = x.shape
    return _convolve(jnp.pad(x, ((0, 0), (0, height % stride), (0, width % stride), (0, 0))), kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    return _block_ynnpack_fusion(_convolution(_block_ynnpack_fusion(x), kernel, stride))


def _convolve_forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, stride), (x, kernel)


def _convolve_backward(stride: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    _, of_kernel = jax.vjp(lambda kernel: _convolution(x, kernel, stride), kernel)
    transposed = kernel.swapaxes(2, 3)  # (3, 3, D, C)
    of_x = _spread(gradient, transposed) if stride == 2 else _convolution(gradient, transposed[::-1, ::-1], 1)
    return of_x, *of_kernel(gradient)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _block_ynnpack_fusion(x: Array) -> Array:
    """Returns x, past which no fusion for YNNPACK, begun at a norm's sum, grows to take a convolution in.

    Each takes 1.4 to 7 times as long there as XLA makes it. YNNPACK has no clamp. No fusion of a gradient grows so far.
    """
    return lax.clamp(jnp.array(-jnp.inf, x.dtype), x, jnp.array(jnp.inf, x.dtype))


def _spread(gradient: Float[Array, "B T U D"], kernel: Float[Array, "3 3 D C"]) -> Float[Array, "B 2T 2U C"]:
    """Returns the gradient of a picture that was convolved with stride 2.

    Its even rows met the kernel's row 1, its odd rows row 2 and, one place further, row 0; so did its columns. XLA's
    own gradient, which puts zeros between rows and columns, takes up to 2.6 times as long on CPUs.
    """
    met = slice(1, 2), slice(None, None, -2)

    def lines(rows: int, columns: int) -> Float[Array, "B T U C"]:
        return _convolution(gradient, kernel[met[rows], met[columns]], 1, ((0, rows), (0, columns)))

    spread = jnp.stack([jnp.stack([lines(rows, 0), lines(rows, 1)], axis=3) for rows in (0, 1)], axis=2)
    batch, height, width, _ = gradient.shape
    return spread.reshape(batch, 2 * height, 2 * width, -1)


def _convolution(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "R S C D"],
    stride: int,
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1)),
) -> Float[Array, "B T U D"]:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)
