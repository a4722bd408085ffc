"""Reads boxes that were annotated or detected beforehand from a JSON file in COCO's format."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxclip.errors import UserError
from jaxclip.features.detectors.detections import NONE, Detections

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}


class StoredBoxes:
    """The detector `boxes`: boxes from a file, looked up by a picture's file name or its product's id.

    Names may lack folder and extension, but pictures whose names differ only in these can be looked up only by their
    full names. A picture that the file does not list has no boxes. Scores come from the annotations; an annotation
    without a score has score 1.
    """

    def __init__(self, path: Path):
        self._by_name = _read(path)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [self._by_name.get(self._key(name), NONE) for name in names]

    def _key(self, name: str) -> str:
        return next((key for key in _lookup_keys(name) if key in self._by_name), "")


def make(argument: str) -> StoredBoxes:
    """Returns the detector of the spec `boxes:FILE.json`; the argument is the part after the colon."""
    if not argument:
        raise UserError("the detector boxes needs a file: boxes:FILE.json")
    return StoredBoxes(Path(argument).expanduser())


def _read(path: Path) -> dict[str, Detections]:
    """Returns the detections of each picture under every name by which it can be looked up."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the boxes file {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    images, annotations, categories = (_entries(path, content, key) for key in ("images", "annotations", "categories"))
    labels = {
        _field(path, "categories", item, "id"): str(_field(path, "categories", item, "name")) for item in categories
    }
    detections = {_field(path, "images", image, "id"): ([], [], []) for image in images}
    sizes = {image["id"]: _size(path, image) for image in images}
    for annotation in annotations:
        image_id = _field(path, "annotations", annotation, "image_id")
        category_id = _field(path, "annotations", annotation, "category_id")
        if image_id not in detections or category_id not in labels:
            missing = f"image {image_id}" if image_id not in detections else f"category {category_id}"
            section = "images" if image_id not in detections else "categories"
            raise UserError(
                f'{path} has an annotation of {missing}, but no entry of "{section}" has this id: '
                "add the entry or remove the annotation"
            )
        boxes, scores, names = detections[image_id]
        boxes.append(_box(path, annotation, *sizes[image_id]))
        scores.append(_score(path, annotation))
        names.append(labels[category_id])
    by_file_name = {
        str(_field(path, "images", image, "file_name")): Detections.of(*detections[image["id"]]) for image in images
    }
    return _add_short_names(by_file_name)


def _entries(path: Path, content: Any, key: str) -> list[dict]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'{path} is not in COCO\'s format: it needs a list of objects under "{key}"')
    return entries


def _field(path: Path, section: str, entry: dict, key: str) -> Any:
    if isinstance(entry.get(key), str | int):
        return entry[key]
    raise UserError(f'{path} has an entry in "{section}" without "{key}": {json.dumps(entry)[:80]}')


def _size(path: Path, image: dict) -> tuple[float, float]:
    size = image.get("width"), image.get("height")
    if not all(isinstance(side, int | float) and side > 0 for side in size):
        raise UserError(f'{path} does not give "width" and "height" of image {image["id"]} in pixels')
    return size


def _box(path: Path, annotation: dict, width: float, height: float) -> list[float]:
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
        raise UserError(
            f'{path} has an annotation of image {annotation["image_id"]} whose "bbox" is {json.dumps(box)[:80]}; '
            "give [left, top, width, height] in pixels"
        )
    left, top, box_width, box_height = box
    return [left / width, top / height, (left + box_width) / width, (top + box_height) / height]


def _score(path: Path, annotation: dict) -> float:
    score = annotation.get("score", 1.0)
    if not isinstance(score, int | float):
        raise UserError(
            f'{path} has an annotation of image {annotation["image_id"]} whose "score" is not a number: {score}'
        )
    return score


def _add_short_names(by_file_name: dict[str, Detections]) -> dict[str, Detections]:
    """Returns the detections also by the names without folder and extension that only one picture has."""
    by_short_name: dict[str, Detections] = {}
    ambiguous = set()
    for file_name, detections in by_file_name.items():
        for key in _lookup_keys(file_name)[1:]:
            if key in by_short_name:
                ambiguous.add(key)
            by_short_name[key] = detections
    return {key: detections for key, detections in by_short_name.items() if key not in ambiguous} | by_file_name


def _lookup_keys(name: str) -> list[str]:
    """Returns the names by which a picture is looked up, from its path to its file name without extension."""
    path = PurePosixPath(name.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return list(dict.fromkeys([name, path.name, stem]))
