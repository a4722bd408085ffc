"""Checks of one field's value that choices and limits cannot express.

Each check takes the field's dotted name and its value, and returns one sentence for each problem.
"""

import difflib
from collections.abc import Sequence

from jaxclip.catalog import captions
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError
from jaxclip.features.detect import DETECTORS
from jaxclip.features.rerank import FEATURES
from jaxclip.models.transformer import remat_policy

NO_DETECTOR = "none"
RERANK_FEATURES = tuple(FEATURES)


def not_one_of(value: str, choices: Sequence[str]) -> str:
    """Returns the end of an error: "is not one of" the choices, and a suggestion if a choice is close to the value."""
    near = difflib.get_close_matches(value, choices, 1)
    return f"is not one of {', '.join(choices)}" + (f"; did you mean {near[0]}?" if near else "")


def caption_template(name: str, template: str) -> list[str]:
    """Returns a sentence for each problem: the template's fields or braces are invalid."""
    return [f"{name}: {problem}" for problem in captions.check(template)]


def detector(name: str, spec: str) -> list[str]:
    """Returns a sentence for each problem: the spec names no detector."""
    detectors = (NO_DETECTOR, *DETECTORS)
    kind = spec.partition(":")[0]
    if kind in detectors:
        return []
    return [f"{name} = {spec!r} {not_one_of(kind, detectors)}"]


def pair_variant(name: str, variant: str) -> list[str]:
    """Returns a sentence for each problem: the rule for incorrect pairs is unknown."""
    if variant in ("clustered", "random"):
        return []
    from jaxclip.features import incorrect_pairs  # takes a second to load

    try:
        incorrect_pairs.threshold(variant)
    except UserError as error:
        return [f"{name}: {error}"]
    return []


def pair_features(name: str, features: str) -> list[str]:
    """Returns a sentence for each problem: the features for mining are unknown."""
    kind, _, source = features.partition(":")
    two_encoders = kind == "encoders" and all(source.split(",")) and source.count(",") == 1
    if features == "classical" or two_encoders or (kind == "towers" and source):
        return []
    return [
        f"{name} = {features!r} must be classical, towers:WORKDIR with a trained run, or encoders:VIT,BERT with "
        "the folder or Hugging Face name of a ViT and of a BERT"
    ]


def interval(name: str, ends: tuple[float, float]) -> list[str]:
    """Returns a sentence for each problem: the ends are in descending order."""
    return [] if ends[0] <= ends[1] else [f"{name} = {ends} must be an interval, the lower number first"]


def depths(name: str, ks: tuple[int, ...]) -> list[str]:
    """Returns a sentence for each problem: 1 is missing or a depth is below 1."""
    return [] if 1 in ks and min(ks) >= 1 else [f"{name} = {ks} must be depths >= 1 that include 1"]


def not_empty(name: str, numbers: tuple[float, ...]) -> list[str]:
    """Returns a sentence for each problem: there are no numbers."""
    return [] if numbers else [f"{name} = {numbers} must hold at least one number"]


def sources(name: str, triples: tuple[tuple[str, str, float], ...]) -> list[str]:
    """Returns a sentence for each problem: no such reader, no path, or a weight that is not above 0."""
    problems, readers = [], [reader for reader in READERS if reader != "drawn"]
    for reader, path, weight in triples:
        if reader not in readers:
            problems.append(f"{name}: the reader {reader!r} {not_one_of(reader, readers)}")
        if not path:
            problems.append(f"{name}: a catalogue of {reader} has no path")
        if weight <= 0:
            problems.append(f"{name}: the weight of {path} is {weight}, but must be greater than 0")
    return problems


def rates(name: str, pairs: tuple[tuple[str, float], ...]) -> list[str]:
    """Returns a sentence for each problem: a factor is negative."""
    return [f"{name} = {pairs}: no factor may be negative"] if any(factor < 0 for _, factor in pairs) else []


def remat(name: str, policy: str) -> list[str]:
    """Returns a sentence for each problem: there is no such policy."""
    try:
        remat_policy(policy)
    except ValueError as error:
        return [f"{name} = {policy!r} is not a policy: {error}"]
    return []


def rerank_features(name: str, features: str) -> list[str]:
    """Returns a sentence for each problem: a feature is unknown, repeated, or none is named."""
    names = [part.strip() for part in features.split(",") if part.strip()]
    problems = [
        f"{name}: {part!r} {not_one_of(part, RERANK_FEATURES)}" for part in names if part not in RERANK_FEATURES
    ]
    if not names or len(set(names)) < len(names):
        problems.append(f"{name} = {features!r} must name at least one feature, and each only once")
    return problems


def rerank_ablation(name: str, subsets: tuple[tuple[str, str], ...]) -> list[str]:
    """Returns a sentence for each problem: a subset has such a problem; see `rerank_features`."""
    return [problem for part, features in subsets for problem in rerank_features(f"{name}[{part!r}]", features)]
