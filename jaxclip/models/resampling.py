"""Scales pictures on the device to nearly the same pixels as Pillow on the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def bilinear(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the triangle kernel of radius 1 at each x."""
    return jnp.maximum(1 - jnp.abs(x), 0)


def bicubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the cubic convolution kernel of radius 2 with a = -1/2 (Keys 1981) at each x."""
    x = jnp.abs(x)
    return jnp.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, jnp.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))


FILTERS: dict[str, Callable[[Array], Array]] = {"bicubic": bicubic, "bilinear": bilinear}


def scale(
    pixels: UInt8[Array, "B C C 3"], extents: Int[Array, "B 2"], size: int, filter: str
) -> UInt8[Array, "B S S 3"]:
    """Returns pictures scaled with antialiasing to `size` x `size` pixels; some levels (0 to 255) are one off Pillow's.

    Like Pillow, it scales rows first, then columns, and rounds to whole levels in between. Levels are exact in
    bfloat16, in which devices multiply fastest; each weight is the sum of two bfloat16 numbers. Pillow 13 scales the
    columns of some tall pictures first; these differ by several levels where the intermediate values were clipped at
    black or white.

    Args:
      pixels: square canvases of side C with a picture in the top left corner of each.
      extents: height and width of each picture, in pixels.
      size: S, the side of the returned pictures, in pixels.
      filter: key of FILTERS.
    """
    vertical, horizontal = (_weights(extents[:, axis], pixels.shape[1], size, FILTERS[filter]) for axis in (0, 1))
    return _weighted_sum("bhoc,bph->bpoc", _weighted_sum("bhwc,bow->bhoc", pixels, horizontal), vertical)


def _weights(extent: Int[Array, " B"], canvas: int, size: int, kernel: Callable) -> Float[Array, "B S C"]:
    """Returns the weight of each of C = `canvas` source pixels in each of S = `size` target pixels along one axis."""
    extent = extent[:, None, None]
    source, target = jnp.arange(canvas), jnp.arange(size)[:, None]
    # Distance of pixel centres in units of 1 / (2 * size) source pixels: a whole number, so that it is not rounded.
    distance = (2 * source + 1) * size - (2 * target + 1) * extent
    values = kernel(distance / (2.0 * jnp.maximum(extent, size))) * (source < extent)
    return values / values.sum(axis=-1, keepdims=True)


def _weighted_sum(subscripts: str, pixels: UInt8[Array, "..."], weights: Float[Array, "..."]) -> UInt8[Array, "..."]:
    high = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=7)
    levels = pixels.astype(jnp.bfloat16)
    total = sum(
        jnp.einsum(subscripts, levels, part.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        for part in (high, weights - high)
    )
    return jnp.clip(jnp.floor(total + 0.5), 0, 255).astype(jnp.uint8)
