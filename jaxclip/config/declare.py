"""How one field of the configuration is declared: default, meaning, choices, limits and the choice that reads it."""

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Only = tuple[str, tuple[str, ...]]
"""(dotted name of another field, its values): the declared field is read only where that field has one of them."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, each end included or not."""

    low: float
    high: float = math.inf
    low_included: bool = True
    high_included: bool = True

    def __contains__(self, number: float) -> bool:
        above = number >= self.low if self.low_included else number > self.low
        return above and (number <= self.high if self.high_included else number < self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'at least' if self.low_included else 'greater than'} {self.low}"
        return f"in {'[' if self.low_included else '('}{self.low}, {self.high}{']' if self.high_included else ')'}"


ABOVE_ZERO = Interval(0, low_included=False)
ZERO_TO_ONE = Interval(0, 1)
BELOW_ONE = Interval(0, 1, high_included=False)


def at_least(low: float) -> Interval:
    """Returns the numbers from `low` up."""
    return Interval(low)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What is known of a field or a section besides its name, type and default.

    Attributes:
      meaning: one line, with the unit; of a section the docstring of its class.
      choices: the allowed values; empty = not restricted to a list.
      limits: where a number, or each number of a tuple, must lie. The default is allowed wherever it lies.
      check: check(dotted name, value) -> one sentence for each problem; for what choices and limits cannot express.
      only: the choice of another field that reads this one; elsewhere it must keep its default.
      otherwise: the value that replaces the default where `only` does not hold; None = the default.
      from_checkpoint: model.init_from determines the value, so that it may not be set with it.
    """

    meaning: str
    choices: tuple[str, ...] = ()
    limits: Interval | None = None
    check: Callable[[str, Any], list[str]] | None = None
    only: Only | None = None
    otherwise: Any = None
    from_checkpoint: bool = False


def key(
    default: Any,
    meaning: str,
    *,
    choices: Iterable[str] = (),
    limits: Interval | None = None,
    check: Callable[[str, Any], list[str]] | None = None,
    only: Only | None = None,
    otherwise: Any = None,
    from_checkpoint: bool = False,
) -> Any:
    """Returns a dataclass field with its declaration; the arguments are described at `Declaration`."""
    declaration = Declaration(meaning, tuple(choices), limits, check, only, otherwise, from_checkpoint)
    return dataclasses.field(default=default, metadata={"declaration": declaration})


def section(cls: type, *, only: Only | None = None) -> Any:
    """Returns a dataclass field that holds a section, all of whose fields may depend on one choice (`only`)."""
    declaration = Declaration(cls.__doc__ or "", only=only)
    return dataclasses.field(default_factory=cls, metadata={"declaration": declaration})


@dataclasses.dataclass(frozen=True)
class Key:
    """A declared field or section: its dotted name, type, default and declaration."""

    name: str
    kind: Any
    default: Any
    declaration: Declaration

    @property
    def is_section(self) -> bool:
        return dataclasses.is_dataclass(self.kind)


@functools.cache
def members(cls: type, prefix: str = "") -> tuple[Key, ...]:
    """Returns the fields and sections that a section's class declares, in order; their names begin with the prefix."""
    return tuple(_members(cls, prefix))


@functools.cache
def keys(cls: type, prefix: str = "") -> tuple[Key, ...]:
    """Returns every field of a section's class and of the sections in it, in order."""
    nested = [keys(own.kind, f"{own.name}.") if own.is_section else (own,) for own in members(cls, prefix)]
    return tuple(itertools.chain(*nested))


def _members(cls: type, prefix: str) -> Iterator[Key]:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        yield Key(prefix + field.name, kinds[field.name], default, field.metadata["declaration"])


def value_of(config: Any, name: str) -> Any:
    """Returns the value of a field, or a section, by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def describe_type(kind: Any) -> str:
    """Returns a type in words, with an example of how a tuple is written."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(kind, types.GenericAlias):
        inner = typing.get_args(kind)
        if inner[0] in (int, float):
            many = "numbers in brackets, as (1, 5, 10)"
            return many if Ellipsis in inner else f"{len(inner)} numbers, as {(0.5, 1.0, 0.5)[: len(inner)]}"
        if inner[0] == tuple[str, str]:
            return "pairs, as (('all', 'image,colour'), ('one', 'image')), or a mapping, as {'one': 'image'}"
        return "pairs, as (('^image/stem', 0.0), ('bias$', 0.5)), or a mapping, as {'^image/stem': 0.0}"
    return names[kind]
