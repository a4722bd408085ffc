"""Linear maps of one or several axes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxclip.models.forms import per_backend

PRODUCT = "linear product"
"""The name by which a rematerialisation policy can save the products of linear maps, however they are computed."""


class Linear(nnx.LinearGeneral):
    """A linear map of the last axis or axes, plus the output of its adapter if it has one (`models.lora`)."""

    lora: nnx.Module | None = None

    def __call__(
        self, x: Array, *, rng: Key[Array, ""] | None = None, arrange: Callable[[Array], Array] = lambda y: y
    ) -> Array:
        """Returns the map of x, with `arrange` applied to its output axes: in effect, to those of the parameters."""
        kernel = arrange(self.kernel[...])
        bias = None if self.bias is None else arrange(self.bias[...])
        x, kernel = self.promote_dtype((x, kernel), dtype=self.dtype)
        y = checkpoint_name(contract(x, kernel, len(self.in_features)), PRODUCT)
        if bias is not None:
            y = add_bias(y, bias)
        return y if self.lora is None else y + arrange(self.lora(x, rng=rng))


@per_backend
def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Returns (..., *N), the product of (..., *K) and (*K, *N), where *K stands for `axes` axes."""
    return jnp.tensordot(x, kernel, axes)


@jax.custom_vjp
def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x + bias in the dtype of x, where the axes of the bias are the last axes of x.

    The gradient of the bias is a sum over rows in the dtype of the bias, float32, whatever the dtype of x.
    """
    return x + bias.astype(x.dtype)


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, sum_rows(gradient, gradient.ndim - bias.ndim, bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@per_backend
def sum_rows(x: Array, axes: int, dtype: jnp.dtype) -> Array:
    """Returns the sum over the first `axes` axes of x, computed in `dtype`."""
    return jnp.sum(x, tuple(range(axes)), dtype)
