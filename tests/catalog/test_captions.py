"""Captions contain the name and the attributes that add a word, without repetition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog.captions import DEFAULT_TEMPLATE, PROMPTS, build, check, fields, normalise

SHIRT = {"baseColour": "Navy Blue", "pattern": "Checked", "season": "Fall", "usage": "Casual"}


def test_the_default_template_appends_words_that_the_name_lacks():
    caption = build("Turtle Check Men Navy Shirt", SHIRT, DEFAULT_TEMPLATE)
    assert caption == "Turtle Check Men Navy Shirt Blue Checked Fall Casual"


@pytest.mark.parametrize(
    ("template", "caption"),
    [
        ("a photo of a {name}", "a photo of a Red Bag"),
        ("{missing} {name} {missing}", "Red Bag"),
        ("{name}, {missing}, {season}", "Red Bag Summer"),
        ("{name}, {season}.", "Red Bag, Summer."),
        ("{name} ({missing})", "Red Bag"),
        ("{name} ({season})", "Red Bag (Summer)"),
        ("{colour} {name}", "Red Bag"),
        ("{season}, {name}", "Summer, Red Bag"),
        ("{missing}, {name}", "Red Bag"),
        ("{name} for summer {season} {occasion}", "Red Bag for summer party"),
        ("{{x}} {name}", "{x} Red Bag"),
    ],
)
def test_absent_and_redundant_attributes_leave_no_trace(template, caption):
    attributes = {"colour": "RED!", "season": "Summer", "occasion": "(summer) party"}
    assert build("Red  Bag", attributes, template) == caption


def test_words_of_name_and_template_are_always_kept():
    assert build("Bora Bora bora", {}, "a a {name} a") == "a a Bora Bora bora a"


def test_an_attribute_that_is_not_kept_neither_appears_nor_removes_words():
    attributes = {"baseColour": "Blue", "pattern": "Blue Stripes"}
    assert build("Bag", attributes, "{name} {baseColour} {pattern}", keep={"pattern"}) == "Bag Blue Stripes"
    assert build("Bag", attributes, "{name} {baseColour} {pattern}", keep=()) == "Bag"
    assert build("Bag", attributes, "{name} {pattern} {baseColour}") == "Bag Blue Stripes"


WORDS = st.lists(st.text("aAbB-,.'", min_size=1, max_size=4), max_size=4).map(" ".join)


@given(WORDS.filter(str.strip), st.dictionaries(st.sampled_from(["x", "y"]), WORDS))
def test_a_caption_starts_with_its_name_and_does_not_repeat_attribute_words(name, attributes):
    caption = build(name, attributes, "{name} {x} {y}")
    assert caption.startswith(name)
    added = [word.casefold().strip("-,.'") for word in caption[len(name) :].split()]
    added = [word for word in added if word]
    assert len(set(added)) == len(added)
    assert not set(added) & {word.casefold().strip("-,.'") for word in name.split()}
    everything = {word.casefold().strip("-,.'") for value in [name, *attributes.values()] for word in value.split()}
    assert everything - {""} == {word.casefold().strip("-,.'") for word in caption.split()} - {""}


def test_fields_are_the_attributes_in_order():
    assert fields(DEFAULT_TEMPLATE) == ("baseColour", "pattern", "materialType", "season", "usage")
    assert fields("{x} {name} {y} {x} of {Print or Pattern Type}") == ("x", "y", "Print or Pattern Type")


def test_all_built_in_templates_pass_the_check():
    assert [check(template) for template in (DEFAULT_TEMPLATE, *PROMPTS)] == [[]] * 18
    assert len(set(PROMPTS)) == 17


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{name", "unbalanced"),
        ("name}", "unbalanced"),
        ("a photo", "lacks {name}"),
        ("{{name}}", "lacks {name}"),
        ("{name} {}", "may have only"),
        ("{name:>9}", "may have only"),
        ("{name!r}", "may have only"),
    ],
)
def test_an_invalid_template_is_explained(template, message):
    assert len(check(template)) == 1
    assert message in check(template)[0]


@given(st.text(), st.dictionaries(st.sampled_from(["x", "y"]), st.text()))
def test_every_template_that_passes_the_check_can_be_built(template, attributes):
    for candidate in (template, "{name} " + template):
        if not check(candidate):
            build("Bag", attributes, candidate)
            fields(candidate)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Puma  Shoe", " puma shoe\n"), ("STRASSE", "straße"), ("ｆｕｌｌ", "full"), ("cafe\u0301", "CAFÉ")],
)
def test_equivalent_captions_are_equal_when_normalised(one, other):
    assert normalise(one) == normalise(other)


@given(st.text())
def test_normalising_twice_changes_nothing(caption):
    assert normalise(normalise(caption)) == normalise(caption)
