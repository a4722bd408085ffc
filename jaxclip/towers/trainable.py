"""Which parameters are trained, and at what factor of the learning rate: by name, separately for each layer."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.errors import UserError
from jaxclip.models.transformer import Segments
from jaxclip.towers.params import Params
from jaxclip.towers.sharding import names

Rates = Sequence[tuple[str, float]]

BLOCKS = "/blocks/"  # followed by the index of a layer, or by a parameter that stacks all layers
BELOW_BLOCKS = r"/(stem|class_token|positions|first_norm|token_embedding)(/|$)"


@dataclass(frozen=True)
class Trainable:
    """Which of a model's parameters are trained; without arguments, all of them.

    A stack is a parameter whose first axis is the layer.

    Attributes:
      factors: name -> factor of the learning rate, one number or, for a stack, an array with one per layer; 0 = frozen.
        The factor of a name that is missing is 1.
    """

    factors: dict[str, float | np.ndarray] = field(default_factory=dict)

    def pick(self, params: Params) -> Params:
        """Returns the trained parameters; a stack contributes only its trained layers, concatenated."""

        def layers(name: str, leaf: jax.Array) -> jax.Array:
            runs = self._runs(name)
            return jnp.concatenate([leaf[a:b] for a, b, trained in runs if trained]) if runs else leaf

        partly_trained = self.stored(params)
        return jax.tree.map(layers, names(partly_trained), partly_trained)

    def put(self, trained: Params, params: Params) -> Params:
        """Returns the parameters with the trained ones (see `pick`) replaced by `trained`."""

        def replace_layers(leaf: jax.Array, runs: Any, new: jax.Array) -> jax.Array:
            for start, end, part in _split(new, runs):
                leaf = leaf.at[start:end].set(part)
            return leaf

        return self._insert(trained, params, replace_layers)

    def assemble(self, trained: Params, params: Params) -> Params:
        """Returns what `put` returns, but copies nothing: partly trained stacks are Segments, which the towers read."""

        def parts(leaf: jax.Array, runs: Any, new: jax.Array) -> Segments:
            trained_part = {start: part for start, _, part in _split(new, runs)}
            return Segments(trained_part.get(start, leaf[start:end]) for start, end, _ in runs)

        return self._insert(trained, params, parts)

    def trained_factors(self, trained: Params) -> Any:
        """Returns a factor for each leaf of `pick`'s result: a number, or an array that broadcasts to the leaf."""

        def factor(name: str, leaf: Any) -> Any:
            value = self.factors.get(name, 1.0)
            if np.ndim(value) == 0:
                return value
            return value[value != 0].astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))

        return jax.tree.map(factor, names(trained), trained)

    def stored(self, params: Params) -> Params:
        """Returns the parameters without the frozen ones; a partly trained stack is included whole."""
        flat = flatten_dict(params)
        return unflatten_dict({path: flat[path] for path in flat if np.any(self.factors.get(_name(path), 1.0))})

    def _runs(self, name: str) -> list[tuple[int, int, bool]] | None:
        """Returns (start, end, trained) of each run of adjacent layers that are all trained or all frozen.

        None unless the name is that of a stack of which only some layers are trained.
        """
        factor = self.factors.get(name, 1.0)
        if np.ndim(factor) == 0 or np.all(factor):
            return None
        grouped = [(key, len(list(run))) for key, run in itertools.groupby(factor != 0)]
        ends = list(itertools.accumulate(size for _, size in grouped))
        return [(end - size, end, bool(key)) for end, (key, size) in zip(ends, grouped, strict=True)]

    def _insert(self, trained: Params, params: Params, change: Callable) -> Params:
        if not self.factors:
            return trained
        flat = flatten_dict(params)
        for path, new in flatten_dict(trained).items():
            runs = self._runs(_name(path))
            flat[path] = change(flat[path], runs, new) if runs else new
        return unflatten_dict(flat)


EVERYTHING = Trainable()


def make_trainable(shapes: Params, rates: Rates, *, layer_decay: float = 1.0) -> Trainable:
    """Returns which parameters are trained, and their factors of the learning rate.

    Args:
      shapes: the shapes of all parameters, nested by name.
      rates: (regex, factor of the learning rate); 0 freezes. The first regex that matches part of a parameter's name
        applies, 1 if none does. In a stack, each layer has a name too ("image/transformer/blocks/11/mlp_in/kernel") in
        addition to the name of the stack ("image/transformer/blocks/mlp_in/kernel").
      layer_decay: a layer's factor is multiplied by it once for each layer above, where the head counts as a layer
        (Clark et al. 2020, ELECTRA; Bao et al. 2021, BEiT). The embeddings below the first layer count as a layer.

    Raises:
      UserError: a regex is invalid or matches no name, or all parameters are frozen.
    """
    shape_of = {_name(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    layers = {name: _layer_names(name, shape) for name, shape in shape_of.items()}
    depths = {tower: _depth(tower, layers) for tower in {name.split("/")[0] for name in layers}}
    _check(rates, [layer for layer_names in layers.values() for layer in layer_names])
    factors: dict[str, float | np.ndarray] = {}
    for name, layer_names in layers.items():
        values = [_factor(layer, name, rates) * layer_decay ** _layers_above(layer, depths) for layer in layer_names]
        factors[name] = values[0] if len(set(values)) == 1 else np.asarray(values)
    if not any(np.any(factor) for factor in factors.values()):
        raise UserError("config.optimizer.rates freezes every parameter: give some parameters a rate above 0")
    return Trainable({} if all(np.all(np.equal(factor, 1.0)) for factor in factors.values()) else factors)


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))


def _split(new: jax.Array, runs: list[tuple[int, int, bool]]) -> list[tuple[int, int, jax.Array]]:
    """Returns (start, end, their layers) for each sequence of adjacent trained layers in a stack.

    Args:
      new: the trained layers of the stack, concatenated.
      runs: (start, end, trained) for each sequence of adjacent layers (see `Trainable._runs`).
    """
    trained_runs = [(start, end) for start, end, trained in runs if trained]
    offsets = [0, *itertools.accumulate(end - start for start, end in trained_runs)]
    return [(a, b, new[offset : offset + b - a]) for (a, b), offset in zip(trained_runs, offsets, strict=False)]


def _layer_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the name of each layer if the parameter is a stack, else only its own name."""
    before, blocks, after = name.partition(BLOCKS)
    if not blocks or after.split("/")[0].isdigit():
        return [name]
    return [f"{before}{BLOCKS}{layer}/{after}" for layer in range(shape[0])]


def _layer_of(name: str) -> int | None:
    return int(name.partition(BLOCKS)[2].split("/")[0]) if BLOCKS in name else None


def _depth(tower: str, layers: dict[str, list[str]]) -> int:
    of_tower = [_layer_of(layer) for name, each in layers.items() if name.split("/")[0] == tower for layer in each]
    return max((layer + 1 for layer in of_tower if layer is not None), default=0)


def _layers_above(name: str, depths: dict[str, int]) -> int:
    """Returns the number of layers above a parameter, where the tower's head counts as one."""
    layer, depth = _layer_of(name), depths[name.split("/")[0]]
    if layer is not None:
        return depth - layer
    return depth + 1 if re.search(BELOW_BLOCKS, name) else 0


def _factor(layer: str, name: str, rates: Rates) -> float:
    return next((float(factor) for pattern, factor in rates if _matches_any(pattern, layer, name)), 1.0)


def _matches_any(pattern: str, *candidates: str) -> bool:
    return any(re.search(pattern, name) for name in candidates)


def _check(rates: Rates, layers: list[str]) -> None:
    stacks = [re.sub(rf"{BLOCKS}\d+/", BLOCKS, name) for name in layers]
    for pattern, _ in rates:
        try:
            matched = _matches_any(pattern, *layers, *stacks)
        except re.error as error:
            raise UserError(f"config.optimizer.rates: {pattern!r} is not a regular expression: {error}") from None
        if not matched:
            raise UserError(
                f"config.optimizer.rates: {pattern!r} matches no parameter's name; a name looks like {layers[0]!r}"
            )
