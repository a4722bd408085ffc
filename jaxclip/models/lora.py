"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on the linear maps of a model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key

from jaxclip.errors import UserError
from jaxclip.models.linear import Linear, contract
from jaxclip.models.transformer import dropout

NAME = "lora"


@dataclass(frozen=True)
class LoRAConfig:
    """The shape of the adapters, and which linear maps get one.

    Attributes:
      rank: rank of the matrix that an adapter adds to a kernel.
      alpha: the output of an adapter is multiplied by alpha / rank.
      dropout: probability that an input feature of an adapter is zeroed in training.
      targets: regular expression; a linear map gets an adapter if its name, such as
        "image/transformer/blocks/attention/qkv", contains a match. All layers of a stack share one name.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str

    @property
    def scale(self) -> float:
        """Factor by which the output of an adapter is multiplied."""
        return self.alpha / self.rank


class LowRankAdapter(nnx.Module):
    """The term scale * (x A) B, which `Linear` adds to its output.

    B is initialised to zero and A uniformly, as in the authors' code. If the kernel is a stack of layers, A and B are
    stacks too.
    """

    def __init__(self, layer: Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        inputs, outputs = tuple(layer.in_features), tuple(layer.out_features)
        stack = layer.kernel.shape[: layer.kernel.ndim - len(inputs) - len(outputs)]
        bound = math.prod(inputs) ** -0.5
        shape = (*stack, *inputs, config.rank)
        self.a = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((*stack, config.rank, *outputs)))
        self.config = config
        self.input_axes = len(inputs)

    def __call__(self, x: Float[Array, "..."], *, rng: Key[Array, ""] | None = None) -> Float[Array, "..."]:
        if self.config.dropout:
            x = dropout(x, self.config.dropout, rng)
        low = contract(x, self.a[...].astype(x.dtype), self.input_axes)  # (..., R)
        return contract(low, self.b[...].astype(x.dtype)) * jnp.asarray(self.config.scale, x.dtype)


def add_adapters(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Adds an adapter to each targeted linear map; the model's outputs do not change until the adapters are trained.

    Raises:
      UserError: the targets are not a valid regular expression, or match no linear map.
    """
    linears = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    try:
        targeted = [layer for name, layer in sorted(linears.items()) if re.search(config.targets, name)]
    except re.error as error:
        raise UserError(f"config.lora.targets: {config.targets!r} is not a regular expression: {error}") from None
    if not targeted:
        raise UserError(
            f"config.lora.targets: {config.targets!r} matches no linear map; the names of linear maps are "
            f"{', '.join(sorted(linears))}"
        )
    for layer in targeted:
        layer.lora = LowRankAdapter(layer, config, rngs=rngs)


def merge(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the parameters with each adapter merged into its kernel: kernel + scale * A B.

    The model without adapters computes the same outputs from them.

    Args:
      params: nested parameters of a model with adapters; not modified.
      scale: alpha / rank.
    """
    flat = flatten_dict(params)
    plain = {path: leaf for path, leaf in flat.items() if NAME not in path}
    for path, b in flat.items():
        if path[-2:] == (NAME, "b"):
            a, kernel = flat[(*path[:-1], "a")], plain[(*path[:-2], "kernel")]
            stacked = a.ndim + b.ndim == kernel.ndim + 3  # A and B both have a layer axis and a rank axis
            product = jax.vmap(_product)(a, b) if stacked else _product(a, b)
            plain[(*path[:-2], "kernel")] = kernel + jnp.asarray(scale, kernel.dtype) * product.astype(kernel.dtype)
    return unflatten_dict(plain)


def _product(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
