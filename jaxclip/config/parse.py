"""From a config file, a workdir or the command line to a configuration, every mistake reported at once."""

import ast
import dataclasses
import difflib
import hashlib
import json
import math
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxclip.config.checks import IMPLIED, contradictions
from jaxclip.config.schema import Config
from jaxclip.errors import UserError


def build(settings: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration that a nested mapping of settings and then `--config.` overrides describe.

    Args:
      settings: section -> field -> value, as a config file's get_config() or a workdir's config.json gives it; what it
        leaves out keeps its default.
      overrides: dotted field -> its text on the command line.

    Raises:
      UserError: naming every unknown key (with the nearest right one), wrong type and impossible value at once.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    kinds = fields()
    for name, value in [*_flatten(settings, kinds), *(overrides or {}).items()]:
        if name not in kinds:
            problems.append(_unknown(name, kinds))
            continue
        text = isinstance(value, str) and name in (overrides or {})
        try:
            values[name] = _convert(value, kinds[name], literal=text)
        except (TypeError, ValueError, SyntaxError, OverflowError):
            problems.append(f"{name} = {value!r} is not {_describe(kinds[name])}")
    for (name, value), defaults in IMPLIED.items():
        values = {**defaults, **values} if values.get(name) == value else values
    config = _assemble(Config, values)
    wrong = {problem.split(" ", 1)[0] for problem in problems}
    problems += contradictions(config, {name: _get(config, name) for name in kinds if name not in wrong})
    if problems:
        raise UserError(_listed(problems))
    return config


def load_config(workdir: Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration saved in a workdir; UserError where there is none or it cannot be read."""
    path = workdir / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a workdir: it has no config.json; give the --workdir of a run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a configuration: it holds {type(settings).__name__}, not an object")
    return build(settings, overrides)


def save_config(config: Config, workdir: Path) -> None:
    """Writes config.json into the workdir, which is made first where it is missing."""
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(dump(config), indent=2) + "\n")
    os.replace(temporary, workdir / "config.json")


def on_first_stage(settings: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns a re-ranker's settings over the catalogue (data and features) of its first stage; others as they are."""
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else dict(settings)
    first, task = (overrides.get(name) or settings.get(name) for name in ("first_stage", "task"))
    if task != "rerank" or not first:
        return settings
    towers = dump(load_config(Path(str(first)).expanduser()))
    return settings | {part: towers[part] | dict(settings.get(part, {})) for part in ("data", "features")}


def dump(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of JSON values; `build` of it gives the configuration back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: Config) -> str:
    """Returns 12 hex digits that change with any field."""
    return hashlib.sha256(json.dumps(dump(config), sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line "field: old -> new" for each field in which two configurations differ."""
    before, after = flat(old), flat(new)
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in before if before[name] != after[name]]


def flat(config: Config) -> dict[str, Any]:
    """Returns every field by its dotted name, as JSON values."""
    return dict(_flatten(dump(config), fields()))


def fields() -> dict[str, Any]:
    """Returns every configurable field by its dotted name, with its type."""
    return dict(_fields(Config))


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _flatten(settings: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    flat = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in kinds:
            flat += _flatten(value, kinds, name + ".")
        else:
            flat.append((name, value))
    return flat


def _unknown(name: str, kinds: Mapping[str, Any]) -> str:
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in kinds}
    leaf = name.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name, kinds, 1) or [
        by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1)
    ]
    sections = sorted({known.rsplit(".", 1)[0] for known in kinds if "." in known})
    if name in sections:
        return (
            f"{name} is a section: set its fields, as {next(known for known in kinds if known.startswith(name + '.'))}"
        )
    return f"{name} is not a key" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def _convert(value: Any, kind: Any, *, literal: bool) -> Any:
    origin = typing.get_origin(kind)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if literal:
        text = value.strip()
        value = (
            {"true": True, "false": False}[text.lower()]
            if text.lower() in ("true", "false")
            else (ast.literal_eval(text))
        )
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError
        if kind is int and value != int(value):
            raise TypeError
        return kind(value)
    if origin is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            if not isinstance(value, list | tuple | Mapping):
                raise TypeError
            items = value.items() if isinstance(value, Mapping) else value
            return tuple(_convert(item, inner[0], literal=False) for item in items)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise TypeError
        return tuple(_convert(item, item_kind, literal=False) for item, item_kind in zip(value, inner, strict=True))
    raise TypeError(f"config field of unsupported type {kind}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if isinstance(kind, types.GenericAlias) and typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner == (int, Ellipsis):
            return "numbers in brackets, as (1, 5, 10)"
        if Ellipsis in inner:
            return "pairs, as (('^text/', 0.0), ('bias$', 0.1)), or a mapping, as {'^text/': 0.0}"
        return f"{len(inner)} numbers, as (0.5, 1.0)"
    return names[kind]


def _assemble(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            arguments[name] = _assemble(kind, values, f"{prefix}{name}.")
        elif prefix + name in values:
            arguments[name] = values[prefix + name]
    return cls(**arguments)


def _get(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"config: {problems[0]}"
    return f"config: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
