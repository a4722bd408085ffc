"""Reference of all fields, generated from their declarations: the lines of --help, and README.md of this folder.

python -m jaxclip.config.reference > jaxclip/config/README.md
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxclip.config.checks import allowed_numbers
from jaxclip.config.declare import Key, Only, describe_type, members
from jaxclip.config.schema import Config

INTRODUCTION = """\
# Configuration

<!-- Generated: python -m jaxclip.config.reference > jaxclip/config/README.md -->

The configuration of a training run is a file of `configs/` with overrides of single fields:

    python -m jaxclip.train --config=configs/quickstart.py --config.batch_size=64 --config.model.preset=tiny

- `--config=configs/NAME.py` or `--config=configs/NAME.py:ARG` names the file. Its `get_config()` returns, by
  section, the fields that it sets; all other fields have their defaults.
- `--config.section.field=VALUE` sets one field. Write a tuple in brackets, such as `(0.5, 1)`, and text without
  quotes. A field of pairs also takes a mapping.
- `python -m jaxclip.train --help` lists every field, and `--help=WORD` only the fields whose name or meaning contains
  the word.
- `evaluate`, `search` and `export` take the configuration from the workdir; only fields that training does not fix can
  be overridden, such as `data.path` and `data.split`.
- Every mistake (an unknown key, a wrong type, a value outside its limits, two fields that contradict each other) is
  reported at once, before anything is written.

To add a field, declare it once in its section, in `schema.py` or `catalogue_sections.py`:

    colours: int = key(3, "number of dominant colours stored for the first crop", limits=at_least(1))

`key` also takes `choices`, `check` (a function of `values.py`), `only` (values of another field with which this one is
read) and `from_checkpoint`; `declare.py` describes them. Checks that concern several fields are functions of
`checks.py`. Then generate this file again with the command in its first comment, and the configurations in
`tests/goldens/configs` with the command at the top of `tests/config/test_goldens.py`.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the reference: its dotted name ("" = the fields outside of sections), meaning and fields."""

    name: str
    meaning: str
    only: Only | None
    fields: tuple[Key, ...]


def sections() -> list[Section]:
    """Returns every section with its fields, in the order of the configuration."""
    return list(_sections(Config, "", (Config.__doc__ or "").strip(), None))


def help_lines(word: str = "") -> list[str]:
    """Returns one line for each field, under a line for its section.

    With a word, only the fields whose name or meaning contains it, whatever its case.
    """
    lines = []
    for section in sections():
        fields = [key for key in section.fields if word.lower() in f"{key.name} {key.declaration.meaning}".lower()]
        if fields:
            lines += ["", f"{section.name or 'config'}: {_section_meaning(section)}"]
            lines += [_help_line(key) for key in fields]
    return lines[1:] or [f"no field has {word!r} in its name or meaning; --help lists all"]


def markdown() -> str:
    """Returns the text of README.md: the introduction and a table of fields for each section."""
    blocks = [INTRODUCTION]
    for section in sections():
        title = f"## `{section.name}`" if section.name else "## Fields outside of sections"
        rows = ["| field | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        rows += [_markdown_row(key) for key in section.fields]
        blocks.append("\n".join([title, "", _section_meaning(section), "", *rows, ""]))
    return "\n".join(blocks)


def _sections(cls: type, name: str, meaning: str, only: Only | None) -> Iterator[Section]:
    declared = members(cls, f"{name}." if name else "")
    yield Section(name, meaning, only, tuple(member for member in declared if not member.is_section))
    for member in declared:
        if member.is_section:
            yield from _sections(member.kind, member.name, member.declaration.meaning, member.declaration.only)


def _section_meaning(section: Section) -> str:
    return section.meaning + (f" Applies only {_only(section.only)}." if section.only else "")


def _help_line(key: Key) -> str:
    properties = "; ".join([describe_type(key.kind).removeprefix("a "), *_allowed(key)])
    return f"  {key.name} = {_written(key.default)} ({properties}): {key.declaration.meaning}"


def _markdown_row(key: Key) -> str:
    kind = describe_type(key.kind).removeprefix("a ")
    cells = [f"`{key.name}`", kind, f"`{_written(key.default)}`", "; ".join(_allowed(key)), key.declaration.meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _allowed(key: Key) -> list[str]:
    """Returns the restrictions of a field in words: choices, limits, and when it applies."""
    declaration, allowed = key.declaration, []
    if declaration.choices:
        allowed.append("one of " + ", ".join(choice or "''" for choice in declaration.choices))
    if declaration.limits is not None:
        allowed.append(("each " if isinstance(key.default, tuple) else "") + allowed_numbers(key))
    if declaration.only:
        allowed.append(f"only {_only(declaration.only)}")
    if declaration.from_checkpoint:
        allowed.append("not with model.init_from, which determines it")
    return allowed


def _only(only: Only) -> str:
    name, values = only
    return f"with {name} = {' or '.join(values)}"


def _written(value: Any) -> str:
    """Returns a value as it is written on the command line; '' for an empty text."""
    if isinstance(value, bool):
        return str(value).lower()
    return (value or "''") if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    print(markdown(), end="")
