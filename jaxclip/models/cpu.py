"""Operations of the towers, written so that XLA's CPU back end compiles them to faster programs.

Each public function equals, up to rounding, the plain definition of the same name in another module. `models.forms`
chooses between the two; `runtime.compiler.TABLE` lists the gain of each.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array


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


def sum_rows(x: Array, axes: int, dtype: jnp.dtype) -> Array:
    """Returns the sum over the first `axes` axes of x, computed in `dtype`, as the product of ones and x.

    XLA computes a sum over rows in several passes, which is slower than the product.
    """
    leading = list(range(axes))
    return jnp.tensordot(jnp.ones(x.shape[:axes], x.dtype), x, (leading, leading), preferred_element_type=dtype)


def sum_by_id(x: Array, ids: Array, shared: Array, zeros: Array) -> Array:
    """Returns, for each id below V, the sum of the rows of x that have it, in the dtype of `zeros`, (V, W).

    One thread adds all rows, so that ids that many rows have need no special care.
    """
    return zeros.at[ids].add(x.astype(zeros.dtype), mode="drop")


def recompute(x: Array, function: Callable[..., Array], *parameters: Array) -> Array:
    """Returns function(x, *parameters). In bfloat16 only the arguments are stored for the gradient.

    Layers are unrolled on CPUs, where XLA would merge what is computed again with the first computation, and store its
    float32 values, but for the barrier that `jax.checkpoint` adds by default.
    """
    return (jax.checkpoint(function) if x.dtype == jnp.bfloat16 else function)(x, *parameters)


def _sum_in_float32(x: Array, y: Array, axes: int | Sequence[Sequence[int]]) -> Array:
    return jnp.tensordot(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)
