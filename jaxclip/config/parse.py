"""Builds a configuration from a config file, a workdir or the command line, and reports every mistake at once."""

import ast
import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxclip.config.checks import find_problems
from jaxclip.config.declare import describe_type, keys, members
from jaxclip.config.schema import Config
from jaxclip.errors import UserError
from jaxclip.runtime import files


def build(settings: Mapping[str, Any], overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration that a nested mapping of settings describes, with `--config.` overrides on top.

    Args:
      settings: section -> field -> value, and field -> value for fields outside of sections, as returned by
        get_config() of a config file or stored in config.json of a workdir; a field that is missing gets its default.
      overrides: dotted name of a field -> its value as text, from the command line.

    Raises:
      UserError: names every unknown key (with the nearest known one), wrong type and impossible value at once.
    """
    problems: list[str] = []
    wrong_types: set[str] = set()
    values: dict[str, Any] = {}
    kinds = fields()
    for name, value in [*_flatten(settings, kinds), *(overrides or {}).items()]:
        if name not in kinds:
            problems.append(_unknown(name, kinds))
            continue
        from_command_line = isinstance(value, str) and name in (overrides or {})
        try:
            values[name] = _convert(value, kinds[name], literal=from_command_line)
        except (TypeError, ValueError, SyntaxError, OverflowError):
            problems.append(f"{name} = {value!r} is not {describe_type(kinds[name])}")
            wrong_types.add(name)
    config = _assemble(Config, _with_values_of_unread_fields(values))
    problems += find_problems(config, wrong_types)
    if problems:
        raise UserError(_listed(problems))
    return config


def load_config(workdir: Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration saved in a workdir, with overrides on top.

    Raises:
      UserError: the workdir has no config.json, the file is not a JSON object, or `build` refuses it.
    """
    path = workdir / "config.json"
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a workdir: it has no config.json; give the --workdir of a run") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a configuration: it must hold a JSON object, not {type(settings).__name__}")
    if isinstance(data := settings.get("data"), dict):
        data.setdefault("validation", 0)  # runs of earlier versions had no validation split
    return build(settings, overrides)


def without_checkpoint_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a config file without the fields that model.init_from can determine."""
    kinds = fields()
    determined = {key.name for key in keys(Config) if key.declaration.from_checkpoint}
    determined |= {"model.preset", "data.image_size", "data.context_length", "data.picture", "data.tokenizer"}
    return {name: value for name, value in _flatten(settings, kinds) if name not in determined}


def save_config(config: Config, workdir: Path) -> None:
    """Writes config.json atomically into a workdir, which is created if it is missing."""
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "config.json", dump(config))


def with_first_stage_catalogue(settings: Mapping[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings; if they are those of a re-ranker, the catalogue of its first stage is their default.

    Fields of the sections `data` and `features` that a re-ranker does not set get their values in the workdir of its
    first stage.
    """
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else dict(settings)
    first, task = (overrides.get(name) or settings.get(name) for name in ("first_stage", "task"))
    if task != "rerank" or not first:
        return settings
    towers = dump(load_config(Path(str(first)).expanduser()))
    return settings | {part: towers[part] | dict(settings.get(part, {})) for part in ("data", "features")}


def dump(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts of JSON values, from which `build` makes it again."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def fingerprint(config: Config) -> str:
    """Returns 12 hex digits of a hash over every field."""
    return files.fingerprint(dump(config))


def differences(old: Config, new: Config) -> list[str]:
    """Returns one line "field: old -> new" for each field in which two configurations differ."""
    before, after = flat(old), flat(new)
    return [f"{name}: {before[name]!r} -> {after[name]!r}" for name in before if before[name] != after[name]]


def flat(config: Config) -> dict[str, Any]:
    """Returns the dotted name of every field -> its value as JSON."""
    return dict(_flatten(dump(config), fields()))


def fields() -> dict[str, Any]:
    """Returns the dotted name of every field -> its type."""
    return {key.name: key.kind for key in keys(Config)}


def _flatten(settings: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns (dotted name, value) for nested settings; a mapping that is the value of a known field is not split."""
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
    """Returns the error for a name that is not a field; it suggests a field of the section so named, or a near name."""
    if field := next((known for known in kinds if known.startswith(f"{name}.")), ""):
        return f"{name} is a section: set its fields, such as {field}"
    by_last_part = {known.rsplit(".", 1)[-1]: known for known in kinds}
    near = difflib.get_close_matches(name, kinds, 1) or [
        by_last_part[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, 1)
    ]
    return f"{name} is not a key" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def _convert(value: Any, kind: Any, *, literal: bool) -> Any:
    """Returns a value converted to the type `kind`.

    Args:
      value: the value from a config file, or its text on the command line.
      kind: the type of the field.
      literal: whether the value is text to be parsed as a Python literal, or as true or false; not if kind is `str`.

    Raises:
      TypeError, ValueError, SyntaxError, OverflowError: the value does not have that type.
    """
    origin = typing.get_origin(kind)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    if literal:
        text = value.strip()
        booleans = {"true": True, "false": False}
        value = booleans[text.lower()] if text.lower() in booleans else ast.literal_eval(text)
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


def _with_values_of_unread_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values, with `otherwise` added for each field that is neither set nor read and declares one."""
    known = {key.name: key for key in keys(Config)}
    implied = {}
    for key in known.values():
        if key.declaration.only and key.declaration.otherwise is not None:
            name, readers = key.declaration.only
            if values.get(name, known[name].default) not in readers:
                implied[key.name] = key.declaration.otherwise
    return implied | dict(values)


def _assemble(cls: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Returns an instance of a section's class; `values` has dotted names, and missing fields get their defaults."""
    arguments = {}
    for member in members(cls, prefix):
        field = member.name.removeprefix(prefix)
        if member.is_section:
            arguments[field] = _assemble(member.kind, values, f"{member.name}.")
        elif member.name in values:
            arguments[field] = values[member.name]
    return cls(**arguments)


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return f"config: {problems[0]}"
    return f"config: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems)
