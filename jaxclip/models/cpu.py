"""Operations of the towers, written so that XLA's CPU back end compiles them to faster programs.

Each public function equals, up to rounding, the plain definition of the same name in `models.linear`. `models.forms`
chooses between the two; `runtime.compiler.TABLE` lists the gain of each.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Returns (..., *N), the product of (..., *K) and (*K, *N), where *K stands for `axes` axes.

    In float32 the leading axes of x become one axis of rows. The gradient of the kernel then sums over one axis; over
    several axes XLA computes it from transposed copies of both operands.
    """
    if x.dtype == jnp.bfloat16:
        return _contract_bfloat16(x, kernel, axes)
    leading, contracted = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    return jnp.tensordot(x.reshape(-1, *contracted), kernel, axes).reshape(*leading, *kernel.shape[axes:])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_bfloat16(x: Array, kernel: Array, axes: int) -> Array:
    """Returns the product, summed in float32 and rounded once; the gradients are computed in the same way.

    XLA's CPU back end has bfloat16 kernels only for products with a float32 result. It computes all others from
    float32 copies of the operands, without the processor's matrix instructions (AMX).
    """
    return _sum_in_float32(x, kernel, axes)


def _contract_forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return _contract_bfloat16(x, kernel, axes), (x, kernel)


def _contract_backward(axes: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    leading = list(range(x.ndim - axes))
    outputs = list(range(len(leading), gradient.ndim)), list(range(axes, kernel.ndim))
    return _sum_in_float32(gradient, kernel, outputs), _sum_in_float32(x, gradient, (leading, leading))


_contract_bfloat16.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x + bias. The gradient of the bias is the product of a vector of ones and the gradient of the sum.

    XLA computes the usual gradient, a sum over rows, in several passes, which is slower than the product.
    """
    return x + bias


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    leading = list(range(gradient.ndim - bias.ndim))
    ones = jnp.ones(gradient.shape[: len(leading)], gradient.dtype)
    return gradient, _sum_in_float32(ones, gradient, (leading, leading))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _sum_in_float32(x: Array, y: Array, axes: int | Sequence[Sequence[int]]) -> Array:
    return jnp.tensordot(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)
