"""How a field of the configuration is declared: default, meaning, choices, limits, and which choice it depends on."""

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Only = tuple[str, tuple[str, ...]]
"""(dotted name of another field, values): the declared field is read only if the other field has one of the values."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; each end may be included or excluded."""

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
    """Everything declared about a field or section except its name, type and default.

    Attributes:
      meaning: one line that includes the unit; for a section, the docstring of its class.
      choices: the allowed values; empty = not restricted to a list.
      limits: interval of the number, or of each number in a tuple. The default is allowed even outside of it.
      check: check(dotted name, value) -> one sentence for each problem that choices and limits cannot express.
      only: values of another field with which this one is read; with other values it must not be set.
      otherwise: the value that this field gets when it is not read; None = its default.
      from_checkpoint: whether model.init_from determines the value; the field must then not be set.
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
    """Returns a dataclass field with a declaration; `Declaration` describes the arguments."""
    declaration = Declaration(meaning, tuple(choices), limits, check, only, otherwise, from_checkpoint)
    return dataclasses.field(default=default, metadata={"declaration": declaration})


def section(cls: type, *, only: Only | None = None) -> Any:
    """Returns a dataclass field that holds a section; `only` applies to all of its fields."""
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
    """Returns the fields and sections that a section's class declares, in order; their names start with the prefix."""
    return tuple(_members(cls, prefix))


@functools.cache
def keys(cls: type, prefix: str = "") -> tuple[Key, ...]:
    """Returns every field of a section's class and of the sections in it, in order; names start with the prefix."""
    nested = [
        keys(member.kind, f"{member.name}.") if member.is_section else (member,) for member in members(cls, prefix)
    ]
    return tuple(itertools.chain(*nested))


def _members(cls: type, prefix: str) -> Iterator[Key]:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        yield Key(prefix + field.name, kinds[field.name], default, field.metadata["declaration"])


def value_of(config: Any, name: str) -> Any:
    """Returns the value of the field or section with this dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def describe_type(kind: Any) -> str:
    """Returns a type in words; for a tuple, with an example."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(kind, types.GenericAlias):
        inner = typing.get_args(kind)
        if inner[0] in (int, float):
            if Ellipsis in inner:
                return "numbers in brackets, such as (1, 5, 10)"
            return f"{len(inner)} numbers, such as {(0.5, 1.0, 0.5)[: len(inner)]}"
        if inner[0] == tuple[str, str, float]:
            return "triples, such as (('folder', 'a/shop', 1.0), ('table', 'b/shop.csv', 0.5))"
        if inner[0] == tuple[str, str]:
            return "pairs, such as (('all', 'image,colour'), ('one', 'image')), or a mapping, such as {'one': 'image'}"
        return "pairs, such as (('^image/stem', 0.0), ('bias$', 0.5)), or a mapping, such as {'^image/stem': 0.0}"
    return names[kind]
