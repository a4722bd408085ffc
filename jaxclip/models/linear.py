"""Linear maps of one or several axes."""

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

    def __call__(self, x: Array, *, rng: Key[Array, ""] | None = None) -> Array:
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
        y = checkpoint_name(contract(x, kernel, len(self.in_features)), PRODUCT)
        if bias is not None:
            y = add_bias(y, bias)
        return y if self.lora is None else y + self.lora(x, rng=rng)


@per_backend
def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Returns (..., *N), the product of (..., *K) and (*K, *N), where *K stands for `axes` axes."""
    return jnp.tensordot(x, kernel, axes)


@per_backend
def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x + bias, where the axes of the bias are the last axes of x."""
    return x + bias
