"""The figures of an evaluation as rows: one for each protocol, direction, stage and catalogue."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

DIRECTIONS = ("text_to_image", "image_to_text")
PROTOCOLS = ("groups", "pairs", "single")
"""The protocols in both directions; the figures of `groups` are the top level of metrics.json."""
RIGHT = {
    "groups": "every product of the query's group (the same name or picture) is right",
    "pairs": "only the query's own product is right, as papers count; texts that repeat lower the highest possible",
    "single": "one product of each group is ranked, mean of 10 draws; one right answer in a smaller, easier gallery",
    "image_to_image": "a picture asks for its product and group, and is itself left out of the gallery",
    "judged": "queries and graded products from data.queries; those with a grade above 0 are right",
}
"""Protocol -> which answers are right."""


@dataclass(frozen=True)
class Row:
    """The figures of one protocol in one direction.

    Attributes:
      protocol: which answers are right: a key of RIGHT, "trials" or "marqo".
      direction: "text_to_image", "image_to_text" or "image_to_image".
      figures: metric -> {"value", "low", "high"}; a mean over catalogues has only the value.
      queries: number of queries; 0 if there is no single number.
      gallery: number of products (from image to text: of texts) that are ranked for each; 0 likewise.
      chance: metric -> its value for a random order, where it is known.
      ceiling: metric -> its highest possible value, which is below 1 where texts repeat.
      stage: "first stage" or "re-ranked" in an evaluation of a re-ranker, else "".
      source: the name of one catalogue of a mixture, "mean" for the mean over the catalogues, "" for all products.
    """

    protocol: str
    direction: str
    figures: Mapping[str, Mapping[str, float]]
    queries: int = 0
    gallery: int = 0
    chance: Mapping[str, float] = field(default_factory=dict)
    ceiling: Mapping[str, float] = field(default_factory=dict)
    stage: str = ""
    source: str = ""


def rows(metrics: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of the content of metrics.json: text to image first, then the other directions, then catalogues.

    Label queries and zero-shot classes are left out, because their figures are by field.
    """
    found = [row for direction in DIRECTIONS for row in _both_ways(metrics, direction)]
    for protocol, direction in (("image_to_image", "image_to_image"), ("judged", "text_to_image")):
        part = metrics.get(protocol, {})
        if "hit@1" in part or "mrr" in part:
            found.append(_row(protocol, direction, part, part, chance="chance"))
    trials = metrics.get("trials", {})
    for direction in DIRECTIONS:
        if direction in trials:
            size = trials["products"]
            found.append(Row("trials", direction, _figures(trials[direction]), size, size))
    if "marqo" in metrics:
        marqo = metrics["marqo"]
        found.append(Row("marqo", "text_to_image", _figures(marqo), marqo["queries"], marqo["documents"]))
    return [*found, *_by_source(metrics)]


def _both_ways(metrics: Mapping[str, Any], direction: str, source: str = "") -> Iterator[Row]:
    for protocol in PROTOCOLS:
        part = metrics if protocol == "groups" else metrics.get(protocol, {})
        if direction not in part:
            continue
        chance = "chance" if direction == "text_to_image" else "chance_image_to_text"
        reranked = direction == "text_to_image" and "first_stage" in part
        if reranked:
            yield _row(protocol, direction, part["first_stage"], part, chance=chance, stage="first stage")
        stage = "re-ranked" if reranked else ""
        yield _row(protocol, direction, part[direction], part, chance=chance, stage=stage, source=source)


def _row(protocol: str, direction: str, figures: Mapping, part: Mapping, *, chance: str, **names: str) -> Row:
    sides = part.get("queries", 0), part.get("gallery", 0)
    names_of_ceilings = {"text_to_image": "ceiling", "image_to_text": "ceiling_image_to_text"}
    ceiling = part.get(names_of_ceilings.get(direction, ""), {})
    queries, gallery = sides[::-1] if direction == "image_to_text" else sides
    return Row(protocol, direction, _figures(figures), queries, gallery, part.get(chance, {}), ceiling, **names)


def _by_source(metrics: Mapping[str, Any]) -> Iterator[Row]:
    for name, part in metrics.get("sources", {}).items():
        for direction in DIRECTIONS:
            yield from _both_ways(part, direction, name)
    for protocol, part in metrics.get("mean_of_sources", {}).items():
        for direction, values in part.items():
            yield Row(protocol, direction, {name: {"value": v} for name, v in values.items()}, source="mean")


def _figures(part: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    return {name: entry for name, entry in part.items() if isinstance(entry, Mapping) and "value" in entry}
