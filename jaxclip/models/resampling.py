"""Pictures scaled on the device, to the pixels that Pillow makes of them on the host."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


def bilinear(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the triangle kernel of radius 1."""
    return jnp.maximum(1 - jnp.abs(x), 0)


def bicubic(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the cubic convolution kernel of radius 2 with a = -1/2 (Keys 1981)."""
    x = jnp.abs(x)
    return jnp.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, jnp.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0))


FILTERS: dict[str, Callable[[Array], Array]] = {"bicubic": bicubic, "bilinear": bilinear}


def scale(
    pixels: UInt8[Array, "B C C 3"], extents: Int[Array, "B 2"], size: int, filter: str
) -> UInt8[Array, "B S S 3"]:
    """Returns pictures scaled to squares of `size` pixels with antialiasing, a level off Pillow's here and there.

    As Pillow does, it scales rows of pixels first, then columns, and keeps whole levels in between. So pixels are exact
    in bfloat16, whose products devices are fastest at; a weight is the sum of two such numbers. Pillow 13 scales the
    columns of some tall pictures first: where black or white is overshot in between, those are some levels off.

    Args:
      pixels: each picture lies in the first corner of its square.
      extents: its height and width.
      size: of the sides of what is returned, pixels.
      filter: a key of FILTERS.
    """
    vertical, horizontal = (_weights(extents[:, axis], pixels.shape[1], size, FILTERS[filter]) for axis in (0, 1))
    return _weighted("bhoc,bph->bpoc", _weighted("bhwc,bow->bhoc", pixels, horizontal), vertical)


def _weights(extent: Int[Array, " B"], canvas: int, size: int, kernel: Callable) -> Float[Array, "B S C"]:
    """Returns the weight of each source pixel in each target pixel along one axis."""
    extent = extent[:, None, None]
    source, target = jnp.arange(canvas), jnp.arange(size)[:, None]
    # Of pixels' centres, in whole 1 / (2 * size) of a source pixel: exact where the distance itself would be rounded.
    distance = (2 * source + 1) * size - (2 * target + 1) * extent
    values = kernel(distance / (2.0 * jnp.maximum(extent, size))) * (source < extent)
    return values / values.sum(axis=-1, keepdims=True)


def _weighted(product: str, pixels: UInt8[Array, "..."], weights: Float[Array, "..."]) -> UInt8[Array, "..."]:
    high = jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=7)
    exact = pixels.astype(jnp.bfloat16)
    found = sum(
        jnp.einsum(product, exact, part.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        for part in (high, weights - high)
    )
    return jnp.clip(jnp.floor(found + 0.5), 0, 255).astype(jnp.uint8)
