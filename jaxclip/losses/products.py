"""Matrix products of the losses at a chosen precision; sums are always float32."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PRODUCTS = ("float32", "bfloat16", "bfloat16_3x")
"""Values of config.loss.products.

"float32" multiplies float32 numbers, which a TPU does with six bfloat16 products. "bfloat16" rounds both operands to
bfloat16. "bfloat16_3x" splits each operand into two bfloat16 numbers, the rounded one and its rounded remainder, and
sums three of the four products of these parts; the fourth is about 2**-16 of the result.
"""


def dot(a: Array, b: Array, axis_a: int, axis_b: int, products: str) -> Array:
    """Returns the float32 product of two matrices, contracted over `axis_a` of a and `axis_b` of b.

    Args:
      products: one of PRODUCTS. Operands that are bfloat16 already are exact in every one of them.

    Raises:
      ValueError: `products` is not one of PRODUCTS.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products = {products!r} must be one of {', '.join(PRODUCTS)}")
    if products == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    elif products == "bfloat16_3x":
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        a = jnp.concatenate([a_high, a_high, a_low], axis_a)
        b = jnp.concatenate([b_high, b_low, b_high], axis_b)
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _halves(x: Array) -> tuple[Array, Array]:
    # Not x.astype(bfloat16).astype(float32), which XLA may replace by x.
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def cosines(rows: Float[Array, "B D"], others: Float[Array, "N D"], products: str) -> Float[Array, "B N"]:
    """Returns the products of all rows with all others; the products of its gradient have the same precision."""
    return dot(rows, others, 1, 1, products) if products == "float32" else _cosines(rows, others, products)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cosines(rows, others, products):
    return dot(rows, others, 1, 1, products)


def _cosines_forward(rows, others, products):
    return dot(rows, others, 1, 1, products), (rows, others)


def _cosines_backward(products, operands, slopes):
    rows, others = operands
    gradients = dot(slopes, others, 1, 0, products), dot(slopes, rows, 0, 0, products)
    return tuple(gradient.astype(x.dtype) for gradient, x in zip(gradients, operands, strict=True))


_cosines.defvjp(_cosines_forward, _cosines_backward)
