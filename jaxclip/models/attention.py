"""Attention of the towers, by the implementation that is fastest on the back end that a program is traced for."""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxclip.errors import UserError
from jaxclip.runtime import compiler

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
"""Values of config.model.attention; see `attend`."""
HALF_TYPES = ("bfloat16", "float16")  # the only types of cuDNN's attention
LARGEST_HEAD = 128  # features of a head, of which cuDNN's attention needs a multiple of 8
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # packages
AMPERE = 8.0  # the lowest compute capability for which cuDNN has fused attention


def attend(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """Returns softmax(query key^T / sqrt(D)) value for each example and head (Vaswani et al. 2017, Eq. 1).

    The softmax is computed in float32. Its weights and the products are of the type of the arguments, with float32
    sums.

    Args:
      query: T tokens that attend.
      key, value: S tokens that are attended to.
      causal: whether a token attends only to itself and to tokens before it; T = S.
      lengths: the number of tokens of each example that are attended to, at least 1; None = all S. The result is
        undefined in rows from `lengths` on if T = S.
      implementation: "xla" writes the attention matrices (B, H, T, S) to memory, "cudnn" (NVIDIA GPUs, 16-bit types)
        and "pallas" (TPUs) do not. "auto" is the one that `choose` returns.

    Raises:
      UserError: the back end, the type or the head is not one for which the implementation exists.
    """
    match resolve(implementation, query.dtype, queries=query.shape[1], head=query.shape[3]):
        case "cudnn":
            return _cudnn(query, key, value, causal, lengths)
        case "pallas":
            from jaxclip.models import tpu  # Pallas takes half a second to import

            return tpu.attention(query, key, value, causal=causal, lengths=lengths)
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, key_value_seq_lengths=lengths, implementation="xla"
    )


def self_attend(
    project: Callable[..., Array],
    *,
    causal: bool = False,
    lengths: Int[Array, " B"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B T H D"]:
    """Returns `attend` of the queries, keys and values of one projection.

    `project()` is (B, T, 3, H, D), queries first; project(arrange=f) is the same with the function f of the last three
    axes applied, if possible to the projection's parameters. All other arguments are those of `attend`.
    """
    options = {"causal": causal, "lengths": lengths}
    shape = jax.eval_shape(project)
    batch, tokens, _, heads, size = shape.shape
    if resolve(implementation, shape.dtype, queries=tokens, head=size) != "pallas":
        return attend(*jnp.unstack(project(), axis=2), implementation=implementation, **options)
    from jaxclip.models import tpu

    mixed = tpu.self_attention(project(arrange=tpu.pack), heads=heads, **options)
    return mixed.reshape(batch, tokens, heads, size)


def choose(dtype: DTypeLike, *, queries: int, head: int) -> str:
    """Returns the implementation "auto" for this back end: "pallas" on TPUs, "cudnn" on GPUs in 16 bits, else "xla".

    It is also "xla" for a single query, whose attention matrix is small, for heads that cuDNN does not support, and on
    GPUs that have no cuDNN or are older than NVIDIA's Ampere.

    Args:
      dtype: type of queries, keys and values.
      queries: number of tokens that attend.
      head: number of features of a head.
    """
    match compiler.backend():
        case _ if queries == 1:
            return "xla"
        case "tpu":
            return "pallas"
        case "gpu" if _cudnn_supports(dtype, head) and _has_cudnn():
            return "cudnn"
    return "xla"


def resolve(implementation: str, dtype: DTypeLike, *, queries: int, head: int) -> str:
    """Returns the implementation, or for "auto" that of `choose`, whose arguments are the others.

    Raises:
      UserError: the implementation does not exist for this back end, type or head.
    """
    if implementation == "auto":
        return choose(dtype, queries=queries, head=head)
    if implementation == "cudnn" and (compiler.backend() != "gpu" or not _cudnn_supports(dtype, head)):
        raise UserError(
            "config.model.attention = cudnn needs an NVIDIA GPU, config.model.dtype = bfloat16, and heads of at most "
            f"{LARGEST_HEAD} features, a multiple of 8: set it to auto"
        )
    if implementation == "pallas" and compiler.backend() == "gpu":
        raise UserError("config.model.attention = pallas needs a TPU: set it to auto")
    return implementation


def even_tokens(
    x: Float[Array, "B T W"], *, head: int, causal: bool, lengths: Int[Array, " B"] | None, implementation: str
) -> tuple[Float[Array, "B U W"], Int[Array, " B"] | None]:
    """Returns x and the lengths for `attend`; U = T + 1, with a token that is not attended to, if cuDNN needs it.

    cuDNN's attention would otherwise copy queries, keys and values of every layer to add it.
    """
    if resolve(implementation, x.dtype, queries=x.shape[1], head=head) != "cudnn":
        return x, lengths
    return _even(x), _lengths_without_padding(x, causal, lengths)


def is_cudnn(primitive, *_, **__) -> bool:
    """Returns whether a primitive is cuDNN's attention, whose second result only its backward pass needs.

    It is a policy of `jax.checkpoint`.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _cudnn_supports(dtype: DTypeLike, head: int) -> bool:
    return jnp.dtype(dtype).name in HALF_TYPES and head <= LARGEST_HEAD and head % 8 == 0


def _has_cudnn() -> bool:
    """Returns whether JAX has a plugin for CUDA, which comes with cuDNN, and the GPU is an Ampere or later."""
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        return False
    capability = getattr(compiler.local_device(), "compute_capability", None)
    return capability is None or float(capability) >= AMPERE


def _cudnn(query: Array, key: Array, value: Array, causal: bool, lengths: Array | None) -> Array:
    """Returns cuDNN's attention. It needs even numbers of tokens, so that one that is masked may be added."""
    queries, lengths = query.shape[1], _lengths_without_padding(key, causal, lengths)
    query, key, value = (_even(x) for x in (query, key, value))
    mixed = jax.nn.dot_product_attention(
        query, key, value, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return mixed[:, :queries]


def _even(x: Float[Array, "B T ..."]) -> Float[Array, "B U ..."]:
    """Returns x, with a token of zeros added if the number of its tokens is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2)))


def _lengths_without_padding(
    x: Float[Array, "B T ..."], causal: bool, lengths: Int[Array, " B"] | None
) -> Int[Array, " B"] | None:
    """Returns the lengths with which the token that `_even` adds is not attended to; None if none are needed.

    Under a causal mask a token at the end is not attended to by those before it.
    """
    if x.shape[1] % 2 == 0 or causal or lengths is not None:
        return lengths
    return jnp.full(len(x), x.shape[1], jnp.int32)
