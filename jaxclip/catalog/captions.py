"""Builds captions from templates, product names and attributes."""

import string
import unicodedata
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import chain

DEFAULT_TEMPLATE = "{name} {baseColour} {pattern} {materialType} {season} {usage}"
"""The name and the attributes that the fit-aware paper appends to it; `build` leaves repeated words out."""

PROMPTS = (
    "a photo of a {name}",
    "a photo of a nice {name}",
    "a photo of a cool {name}",
    "a photo of an expensive {name}",
    "a good photo of a {name}",
    "a bright photo of a {name}",
    "a fashion studio shot of a {name}",
    "a fashion magazine photo of a {name}",
    "a fashion brochure photo of a {name}",
    "a fashion catalog photo of a {name}",
    "a fashion press photo of a {name}",
    "a yoox photo of a {name}",
    "a yoox web image of a {name}",
    "a high-resolution photo of a {name}",
    "a cropped photo of a {name}",
    "a close-up photo of a {name}",
    "a photo of one {name}",
)
"""OpenFashionCLIP's prompts (Cartella et al. 2023, arXiv 2309.05551), as its authors print them in Multimodal Garment
Designer (Baldrati et al. 2023, arXiv 2304.02051, appendix A.1)."""

_Piece = tuple[str, str | None, bool]


def build(name: str, attributes: Mapping[str, str], template: str, keep: Collection[str] | None = None) -> str:
    """Returns the caption of a product, with white space collapsed.

    A word of an attribute is left out if it already occurs in the name, in the template's text or earlier among the
    attributes; the comparison ignores case and surrounding punctuation. If no word of an attribute is left, text next
    to it that is only punctuation is left out too. Words of the name and of the template are always kept.

    Args:
      name: the value of `{name}`.
      attributes: attribute -> value; an attribute of the template that is absent here is treated as empty.
      template: see `fields`; it must have passed `check`.
      keep: names of the attributes to use, None for all; training can drop some at random.
    """
    pieces, template_keys, spaced = _pieces(template)
    name_words = name.split()
    used = {*template_keys, *map(_key, name_words)}
    values = []
    for _, field, _ in pieces:
        if field is None or field == "name":
            values.append(name_words if field else [])
        elif keep is not None and field not in keep:
            values.append([])
        else:
            values.append(_new_words(attributes.get(field, ""), used))
    if spaced:
        return " ".join(chain.from_iterable(values))
    caption, absent_before = "", False
    for (text, field, punctuation), words in zip(pieces, values, strict=True):
        value = name if field == "name" else " ".join(words)
        absent = field is not None and not value
        caption += " " if punctuation and (absent_before or absent) else text
        caption += value
        absent_before = absent
    return " ".join(caption.split())


@lru_cache(maxsize=64)
def fields(template: str) -> tuple[str, ...]:
    """Returns the attributes that a template such as "{name} in {baseColour}" names, each once and without `name`."""
    pieces, _, _ = _pieces(template)
    return tuple(dict.fromkeys(field for _, field, _ in pieces if field not in (None, "name")))


def check(template: str) -> list[str]:
    """Returns one sentence per problem of a template; an empty list if it is valid."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        return [f'the caption template "{template}" has unbalanced braces: write {{name}} or {{ATTRIBUTE}}.']
    problems = []
    for _, field, specification, conversion in parsed:
        if field is not None and (not field.strip() or specification or conversion):
            problems.append(f'the caption template "{template}" may have only {{name}} and {{ATTRIBUTE}} in braces.')
    if all(field != "name" for _, field, _, _ in parsed):
        problems.append(f'the caption template "{template}" lacks {{name}}.')
    return problems


def normalise(caption: str) -> str:
    """Returns a caption in NFKC, casefolded, with white space collapsed; captions with equal results count as equal."""
    # Casefolding can undo NFKC and vice versa; the second round makes the result stable (Unicode D146).
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", caption).casefold())
    return " ".join(unicodedata.normalize("NFKC", folded.casefold()).split())


@lru_cache(maxsize=64)
def _pieces(template: str) -> tuple[tuple[_Piece, ...], frozenset[str], bool]:
    """Returns a template's pieces in order, the keys of its own words, and whether its fields are separated by spaces.

    A piece is (text, the field after it, whether the text is only punctuation or white space); the field is None at the
    end and after an escaped brace. Fields are separated by spaces if there is nothing else in the template.
    """
    parsed = [(text, field) for text, field, _, _ in string.Formatter().parse(template)]
    pieces = tuple((text, field, bool(text) and not any(map(str.isalnum, text))) for text, field in parsed)
    spaced = all(text.isspace() for text, _ in parsed[1:]) and not parsed[0][0].strip()
    return pieces, frozenset(_key(word) for text, _ in parsed for word in text.split()), spaced


def _new_words(value: str, used: set[str]) -> list[str]:
    """Returns the words of an attribute whose `_key` is not in `used`, [] if there are none; adds their keys to it."""
    kept, new = [], False
    for word in value.split():
        key = _key(word)
        if not key:
            kept.append(word)
        elif key not in used:
            kept.append(word)
            used.add(key)
            new = True
    return kept if new else []


@lru_cache(maxsize=1 << 16)
def _key(word: str) -> str:
    """Returns a word casefolded and without punctuation at its ends, for comparison."""
    folded = word.casefold()
    if folded.isalnum():
        return folded
    inside = [index for index, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else ""
