"""Activations and layer norm: cheap operations that the backward pass computes again instead of storing their parts."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxclip.models.forms import per_backend


@per_backend
def recompute(x: Array, function: Callable[..., Array], *parameters: Array) -> Array:
    """Returns function(x, *parameters); for the gradient only the arguments are stored, the rest is computed again.

    In scanned layers XLA would otherwise write every float32 value between two operations of the function to memory.
    """
    return jax.checkpoint(function, prevent_cse=False)(x, *parameters)


@per_backend
def write_gradient_once(x: Array) -> Array:
    """Returns x, whose gradient several operations read."""
    return x


class LayerNorm(nnx.LayerNorm):
    """Layer norm over the last axis, computed in float32 and rounded once to `dtype`.

    Scale and bias are not rounded, and their gradients are float32.
    """

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... W"]:
        def normalise(x: Array, scale: Array, bias: Array) -> Array:
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            rows = (*x.shape[:-1], 1)
            squares = jnp.square(wide)
            mean, mean_square = wide.mean(axis=-1), squares.mean(axis=-1)
            variance = jnp.maximum(0.0, mean_square - jnp.square(mean))
            centred = wide - mean.reshape(rows)
            y = centred * (jax.lax.rsqrt(variance.reshape(rows) + self.epsilon) * scale) + bias
            return y.astype(x.dtype)

        return recompute(x.astype(self.dtype or x.dtype), normalise, self.scale[...], self.bias[...])
