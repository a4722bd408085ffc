"""Boxes that were annotated or detected beforehand, read from a JSON file in COCO's format."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxclip.errors import UserError
from jaxclip.features.detectors.detections import NONE, Detections

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}


class StoredBoxes:
    """The detector `boxes`: boxes from a file, looked up by file name, with or without folder and extension.

    A picture that the file does not list has no boxes. Pictures whose names differ only in folder or extension are
    found by their full name only. Scores are those of the annotations, or 1 if they have no score.
    """

    def __init__(self, path: Path):
        self._by_name = _read(path)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [self._by_name.get(self._key(name), NONE) for name in names]

    def _key(self, name: str) -> str:
        return next((key for key in _keys(name) if key in self._by_name), "")


def make(argument: str) -> StoredBoxes:
    """Returns the detector of `boxes:FILE.json`."""
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
        raise UserError(f"{path} is no JSON: {error}") from error
    images, annotations, categories = (_entries(path, content, key) for key in ("images", "annotations", "categories"))
    labels = {_field(path, "categories", one, "id"): str(_field(path, "categories", one, "name")) for one in categories}
    found = {_field(path, "images", one, "id"): ([], [], []) for one in images}
    sizes = {one["id"]: _size(path, one) for one in images}
    for one in annotations:
        where = _field(path, "annotations", one, "image_id")
        kind = _field(path, "annotations", one, "category_id")
        if where not in found or kind not in labels:
            missing = f"image {where}" if where not in found else f"category {kind}"
            raise UserError(f"{path} has an annotation of {missing}, which it does not list")
        boxes, scores, names = found[where]
        boxes.append(_box(path, one, *sizes[where]))
        scores.append(_score(path, one))
        names.append(labels[kind])
    return _by_name({str(_field(path, "images", one, "file_name")): Detections.of(*found[one["id"]]) for one in images})


def _entries(path: Path, content: Any, key: str) -> list[dict]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise UserError(f'{path} is not in COCO\'s layout: it needs a list of objects under "{key}".')
    return entries


def _field(path: Path, where: str, entry: dict, key: str) -> Any:
    if isinstance(entry.get(key), str | int):
        return entry[key]
    raise UserError(f'{path} has an entry of "{where}" without "{key}": {json.dumps(entry)[:80]}.')


def _size(path: Path, image: dict) -> tuple[float, float]:
    size = image.get("width"), image.get("height")
    if not all(isinstance(side, int | float) and side > 0 for side in size):
        raise UserError(f'{path} does not give "width" and "height" of image {image["id"]} in pixels.')
    return size


def _box(path: Path, annotation: dict, width: float, height: float) -> list[float]:
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)):
        raise UserError(
            f'{path} has an annotation of image {annotation["image_id"]} whose "bbox" is {json.dumps(box)[:80]}; '
            "give [left, top, width, height] in pixels."
        )
    left, top, wide, high = box
    return [left / width, top / height, (left + wide) / width, (top + high) / height]


def _score(path: Path, annotation: dict) -> float:
    score = annotation.get("score", 1.0)
    if not isinstance(score, int | float):
        raise UserError(
            f'{path} has an annotation of image {annotation["image_id"]} whose "score" is no number: {score}.'
        )
    return score


def _by_name(detections: dict[str, Detections]) -> dict[str, Detections]:
    names: dict[str, Detections] = {}
    shared = set()
    for file_name, found in detections.items():
        for key in _keys(file_name)[1:]:
            if key in names:
                shared.add(key)
            names[key] = found
    return {key: found for key, found in names.items() if key not in shared} | detections


def _keys(name: str) -> list[str]:
    """Returns a picture's names, from the whole path to the file name without its extension."""
    path = PurePosixPath(name.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in PICTURES else path.name
    return list(dict.fromkeys([name, path.name, stem]))
