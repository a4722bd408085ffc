"""Every field of the configuration is described in --help and in a README, both generated from the declarations."""

from pathlib import Path

import pytest

from jaxclip import cli, config
from jaxclip.config import reference
from jaxclip.config.declare import keys, members
from jaxclip.config.schema import Config

README = Path(reference.__file__).with_name("README.md")


def test_every_field_and_section_has_a_meaning_of_one_line():
    sections = [member for cls in (Config, type(Config().data)) for member in members(cls) if member.is_section]
    for key in [*keys(Config), *sections]:
        meaning = key.declaration.meaning
        assert len(meaning.split()) >= 2 and "\n" not in meaning and meaning == meaning.strip(), key.name


def test_the_readme_is_generated_from_the_current_declarations():
    generated = reference.markdown()
    assert README.read_text() == generated, (
        "jaxclip/config/README.md is out of date; run: python -m jaxclip.config.reference > jaxclip/config/README.md"
    )
    assert all(f"| `{name}` |" in generated for name in config.fields())


def test_help_has_one_line_per_field_with_its_whole_declaration():
    lines = reference.help_lines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [
        key.name for section in reference.sections() for key in section.fields
    ]
    assert sorted(key.name for section in reference.sections() for key in section.fields) == sorted(config.fields())
    assert "optimizer: The optimizer and its schedule." in lines
    assert (
        "  optimizer.learning_rate = 0.001 (number; at least 0): peak learning rate, reached after the warm-up" in lines
    )
    assert (
        "  loss.weighting = similarity (text; one of similarity, none, literal; "
        "only with loss.name = incorrect_pairs): whether pairs are weighted by the similarity of the two products' "
        "pictures: similarity (yes), none (no) or literal (inside the logarithm, as the paper prints it, where weights "
        "have no effect on the gradient)"
    ) in lines


def test_help_for_a_word_lists_the_fields_whose_name_or_meaning_contains_it():
    lines = reference.help_lines("LEARNING")
    fields = [line.split()[0] for line in lines if line.startswith("  ")]
    assert fields == ["loss.queue", "optimizer.learning_rate", "optimizer.rates"]
    assert lines[0].startswith("loss: ") and "optimizer: The optimizer and its schedule." in lines
    optimizer = [line.split()[0] for line in reference.help_lines("optimizer") if line.startswith("  ")]
    assert optimizer == [name for name in config.fields() if name.startswith("optimizer.")]
    assert reference.help_lines("zebra") == ["no field has 'zebra' in its name or meaning; --help lists all"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--help"], ""),
        (["--workdir=W", "-h"], ""),
        (["--helpshort"], ""),
        (["--help=optimizer"], "optimizer"),
        (["-help= rate "], "rate"),
        (["--workdir=--help"], None),
        ([], None),
    ],
)
def test_help_is_recognised_with_and_without_a_word(arguments, word):
    assert cli.requested_help(arguments) == word
