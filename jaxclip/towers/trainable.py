"""Which parameters are trained, and at which share of the learning rate: by name, layer by layer in a stack."""

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

BLOCKS = "/blocks/"  # in a name, what follows is a layer's number, or the stack of all layers
BELOW_BLOCKS = r"/(stem|class_token|positions|first_norm|token_embedding)(/|$)"


@dataclass(frozen=True)
class Trainable:
    """What is trained of the parameters it was made for; without arguments, all.

    Attributes:
      factors: name -> factor of the learning rate, a number or one per layer of a stack; 0 = frozen.
    """

    factors: dict[str, float | np.ndarray] = field(default_factory=dict)

    def pick(self, params: Params) -> Params:
        """Returns what is trained: no frozen parameter, and of a stack only the layers that are."""

        def layers(name: str, leaf: jax.Array) -> jax.Array:
            runs = self._runs(name)
            return jnp.concatenate([leaf[a:b] for a, b, trained in runs if trained]) if runs else leaf

        kept = self.stored(params)
        return jax.tree.map(layers, names(kept), kept)

    def put(self, trained: Params, params: Params) -> Params:
        """Returns the parameters with what is trained in its place."""

        def place(leaf: jax.Array, runs: Any, new: jax.Array) -> jax.Array:
            for first, last, part in _cut(new, runs):
                leaf = leaf.at[first:last].set(part)
            return leaf

        return self._insert(trained, params, place)

    def assemble(self, trained: Params, params: Params) -> Params:
        """Returns what `put` does, for the towers alone: a stack trained in part is Segments, and nothing is copied."""

        def parts(leaf: jax.Array, runs: Any, new: jax.Array) -> Segments:
            found = {first: part for first, _, part in _cut(new, runs)}
            return Segments(found.get(first, leaf[first:last]) for first, last, _ in runs)

        return self._insert(trained, params, parts)

    def trained_factors(self, trained: Params) -> Any:
        """Returns the factors in the shape of `pick`'s result: a number, or an array that broadcasts to the leaf."""

        def factor(name: str, leaf: Any) -> Any:
            given = self.factors.get(name, 1.0)
            if np.ndim(given) == 0:
                return given
            return given[given != 0].astype(np.float32).reshape(-1, *(1,) * (leaf.ndim - 1))

        return jax.tree.map(factor, names(trained), trained)

    def stored(self, params: Params) -> Params:
        """Returns the parameters without those of which nothing is trained."""
        flat = flatten_dict(params)
        return unflatten_dict({path: flat[path] for path in flat if np.any(self.factors.get(_name(path), 1.0))})

    def _runs(self, name: str) -> list[tuple[int, int, bool]] | None:
        """Returns (first, last + 1, trained) of neighbouring layers alike; None where all or nothing is trained."""
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
    """Returns what is trained of parameters of these shapes, and how fast.

    Args:
      shapes: nested, by name.
      rates: (regex, factor of the learning rate); the first whose regex is found in a parameter's name holds. A stack
        has a name for each of its layers too: "image/transformer/blocks/11/mlp_in/kernel" beside
        "image/transformer/blocks/mlp_in/kernel". 0 freezes.
      layer_decay: each layer's factor is multiplied by it once per layer above, the head counting as one (Clark et al.
        2020, ELECTRA; Bao et al. 2021, BEiT); what feeds the first layer counts as a layer below it.

    Raises:
      UserError: a regex is invalid or is found in no name, or all parameters are frozen.
    """
    shape_of = {_name(path): leaf.shape for path, leaf in flatten_dict(shapes).items()}
    layers = {name: _layer_names(name, shape) for name, shape in shape_of.items()}
    depths = {tower: _depth(tower, layers) for tower in {name.split("/")[0] for name in layers}}
    _check(rates, [name for found in layers.values() for name in found])
    factors: dict[str, float | np.ndarray] = {}
    for name, found in layers.items():
        values = [_factor(layer, name, rates) * layer_decay ** _above(layer, depths) for layer in found]
        factors[name] = values[0] if len(set(values)) == 1 else np.asarray(values)
    if not any(np.any(factor) for factor in factors.values()):
        raise UserError("config.optimizer.rates freezes every parameter")
    return Trainable({} if all(np.all(np.equal(factor, 1.0)) for factor in factors.values()) else factors)


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(map(str, path))


def _cut(new: jax.Array, runs: list[tuple[int, int, bool]]) -> list[tuple[int, int, jax.Array]]:
    """Returns (first, last + 1, layers of `new` that belong there) for each trained run."""
    ours = [(first, last) for first, last, trained in runs if trained]
    starts = [0, *itertools.accumulate(last - first for first, last in ours)]
    return [(a, b, new[start : start + b - a]) for (a, b), start in zip(ours, starts, strict=False)]


def _layer_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the name of each layer of a stack, else the name alone."""
    before, blocks, after = name.partition(BLOCKS)
    if not blocks or after.split("/")[0].isdigit():
        return [name]
    return [f"{before}{BLOCKS}{layer}/{after}" for layer in range(shape[0])]


def _layer_of(name: str) -> int | None:
    return int(name.partition(BLOCKS)[2].split("/")[0]) if BLOCKS in name else None


def _depth(tower: str, layers: dict[str, list[str]]) -> int:
    of_tower = [_layer_of(layer) for name, found in layers.items() if name.split("/")[0] == tower for layer in found]
    return max((layer + 1 for layer in of_tower if layer is not None), default=0)


def _above(name: str, depths: dict[str, int]) -> int:
    """Returns the number of layers above a parameter, its tower's head being one."""
    layer, depth = _layer_of(name), depths[name.split("/")[0]]
    if layer is not None:
        return depth - layer
    return depth + 1 if re.search(BELOW_BLOCKS, name) else 0


def _factor(layer: str, name: str, rates: Rates) -> float:
    return next((float(factor) for pattern, factor in rates if _found(pattern, layer, name)), 1.0)


def _found(pattern: str, *among: str) -> bool:
    return any(re.search(pattern, name) for name in among)


def _check(rates: Rates, layers: list[str]) -> None:
    stacks = [re.sub(rf"{BLOCKS}\d+/", BLOCKS, name) for name in layers]
    for pattern, _ in rates:
        try:
            found = _found(pattern, *layers, *stacks)
        except re.error as error:
            raise UserError(f"config.optimizer.rates: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise UserError(
                f"config.optimizer.rates: {pattern!r} is found in no parameter's name; names are as {layers[0]!r}"
            )
