"""The look-up of token embeddings, with a gradient that is summed in float32 and does not contend for a few rows."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxclip.models.forms import per_backend


def embed_tokens(
    table: Float[Array, "V W"],
    tokens: Int[Array, "B T"],
    *,
    end_token: int,
    reached: Bool[Array, "B T"] | None = None,
    dtype: jnp.dtype,
) -> Float[Array, "B T W"]:
    """Returns the rows of the table for the tokens, in `dtype`; the gradient of the table is summed in its own dtype.

    Nearly every caption has the start token, the end token and padding. Threads that add to the rows of these ids at
    the same time would wait for each other (openxla/xla#26371), so their gradients are summed by one product, and only
    those of the other ids are scattered. Which ids are summed that way affects only speed: `end_token` and those at the
    first and last position of the first caption.

    Args:
      table: the embeddings.
      tokens: ids, at least 0 and less than V.
      end_token: id that ends a caption.
      reached: False at positions on which the loss does not depend, such as padding that nothing attends to. Their
        gradients are zero and are not added. None if the loss depends on all positions.
      dtype: dtype of the result.
    """
    shared = jnp.stack([tokens[0, 0], jnp.asarray(end_token, tokens.dtype), tokens[0, -1]])
    return _look_up(table, tokens, shared, reached, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _look_up(table: Array, tokens: Array, shared: Array, reached: Array | None, dtype: jnp.dtype) -> Array:
    return jnp.take(table.astype(dtype), tokens, axis=0)


def _forward(table: Array, tokens: Array, shared: Array, reached: Array | None, dtype: jnp.dtype) -> tuple:
    return _look_up(table, tokens, shared, reached, dtype), (table, tokens, shared, reached)


def _backward(dtype: jnp.dtype, residuals: tuple, gradient: Float[Array, "B T W"]) -> tuple:
    table, tokens, shared, reached = residuals
    ids = tokens if reached is None else jnp.where(reached, tokens, len(table))
    return sum_by_id(gradient, ids, shared, jnp.zeros_like(table)), None, None, None


_look_up.defvjp(_forward, _backward)


@per_backend
def sum_by_id(
    x: Float[Array, "B T W"], ids: Int[Array, "B T"], shared: Int[Array, " S"], zeros: Float[Array, "V W"]
) -> Float[Array, "V W"]:
    """Returns, for each id below V, the sum of the rows of x that have it, in the dtype of `zeros`.

    Rows with an id of V or more are left out. `shared` are ids that many rows have.
    """
    nowhere = len(zeros)
    repeated = jnp.tril(shared[:, None] == shared, -1).any(axis=1)
    shared = jnp.where(repeated, nowhere, shared)
    is_shared = ids == shared[:, None, None]  # (S, B, T)
    sums = jnp.einsum(
        "sbt,btw->sw",
        is_shared.astype(x.dtype),
        x,
        precision=jax.lax.Precision.HIGHEST if x.dtype == zeros.dtype else None,  # bfloat16 products are exact
        preferred_element_type=zeros.dtype,
    )
    others = jnp.where(is_shared.any(axis=0), nowhere, ids)
    return zeros.at[others].add(x.astype(zeros.dtype), mode="drop").at[shared].add(sums, mode="drop")
