"""Linear maps; bfloat16 products are added up in float32 and rounded once, forwards and backwards, on CPUs too."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from jaxclip.runtime import compiler


class Linear(nnx.LinearGeneral):
    """A linear map of the last axis or axes; where it has an adapter (models/lora.py), what that gives is added."""

    lora: nnx.Module | None = None

    def __call__(self, x: Array, *, rng: Key[Array, ""] | None = None) -> Array:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y = contract(x, kernel, len(self.in_features))
        if bias is not None:
            y = _shift(y, bias) if _widens(y) else y + bias
        return y if self.lora is None else y + self.lora(x, rng=rng)


def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Returns (..., *N), the product of (..., *K) and (*K, *N), where *K are `axes` axes.

    On CPUs float32 is multiplied as a matrix of rows: of a kernel's gradient that adds up over several axes XLA makes
    a copy transposed and a product that takes three times as long. Of bfloat16's it makes a faster one than of rows.
    """
    if _widens(x):
        return _contract(x, kernel, axes)
    if not compiler.on_cpu():
        return jnp.tensordot(x, kernel, axes)
    kept, contracted = x.shape[: x.ndim - axes], x.shape[x.ndim - axes :]
    return jnp.tensordot(x.reshape(-1, *contracted), kernel, axes).reshape(*kept, *kernel.shape[axes:])


def _widens(x: Array) -> bool:
    """Returns whether a product has to be asked for in float32.

    On CPUs XLA has only those for bfloat16, and makes others of float32 copies, which on a processor with matrix
    instructions (AMX) takes four times as long. Other devices have both and round before they write.
    """
    return x.dtype == jnp.bfloat16 and compiler.on_cpu()


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x: Array, kernel: Array, axes: int) -> Array:
    return _rounded(x, kernel, axes)


def _contract_forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return _contract(x, kernel, axes), (x, kernel)


def _contract_backward(axes: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = operands
    rows = list(range(x.ndim - axes))
    columns = list(range(len(rows), gradient.ndim)), list(range(axes, kernel.ndim))
    return _rounded(gradient, kernel, columns), _rounded(x, gradient, (rows, rows))


_contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def _shift(x: Array, bias: Array) -> Array:
    return x + bias


def _shift_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return _shift(x, bias), bias


def _shift_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    """The bias' gradient is a product too: XLA cuts such sums over rows into windows, which takes longer than it."""
    rows = list(range(gradient.ndim - bias.ndim))
    ones = jnp.ones(gradient.shape[: len(rows)], gradient.dtype)
    return gradient, _rounded(ones, gradient, (rows, rows))


_shift.defvjp(_shift_forward, _shift_backward)


def _rounded(x: Array, y: Array, axes: int | Sequence[Sequence[int]]) -> Array:
    return jnp.tensordot(x, y, axes, preferred_element_type=jnp.float32).astype(x.dtype)
