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
    """Which linear maps have an adapter and of what shape.

    Attributes:
      rank: rank of the added matrix.
      alpha: the output of an adapter is multiplied by alpha / rank.
      dropout: share of an adapter's input features zeroed in training.
      targets: regex; a linear map has an adapter where it is found in the map's name, as
        "image/transformer/blocks/attention/qkv". All layers of a stack have one, or none has.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LowRankAdapter(nnx.Module):
    """Adds scale * (x A) B to a linear map of x; B starts at zero, A uniform as in the paper's own code.

    Where the map's kernel is a stack of layers, A and B are too.
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


def adapt(model: nnx.Module, config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Gives each linear map of the model that is targeted an adapter; its outputs stay as they are until it is trained.

    Raises:
      UserError: the targets are no regular expression, or are found in no name.
    """
    linears = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    try:
        targeted = [layer for name, layer in sorted(linears.items()) if re.search(config.targets, name)]
    except re.error as error:
        raise UserError(f"config.lora.targets: {config.targets!r} is not a regular expression: {error}") from None
    if not targeted:
        raise UserError(
            f"config.lora.targets: {config.targets!r} is found in the name of no linear map; names are "
            f"{', '.join(sorted(linears))}"
        )
    for layer in targeted:
        layer.lora = LowRankAdapter(layer, config, rngs=rngs)


def merge(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the parameters of the model without adapters that computes the same: kernel + scale * A B for each.

    Args:
      params: nested, of a model with adapters; not changed.
      scale: alpha / rank.
    """
    flat = flatten_dict(params)
    plain = {path: leaf for path, leaf in flat.items() if NAME not in path}
    for path, b in flat.items():
        if path[-2:] == (NAME, "b"):
            a, kernel = flat[(*path[:-1], "a")], plain[(*path[:-2], "kernel")]
            stacked = a.ndim + b.ndim == kernel.ndim + 3  # both have the layers' axis and the rank's
            product = jax.vmap(_product)(a, b) if stacked else _product(a, b)
            plain[(*path[:-2], "kernel")] = kernel + jnp.asarray(scale, kernel.dtype) * product.astype(kernel.dtype)
    return unflatten_dict(plain)


def _product(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
