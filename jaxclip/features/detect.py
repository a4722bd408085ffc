"""Detectors by name; a detector locates a product, or parts of it, in a picture."""

from collections.abc import Callable

from jaxclip.errors import UserError
from jaxclip.features.detectors import faster_rcnn, foreground, hugging_face, stored, yolo
from jaxclip.features.detectors.detections import NONE, Detections, Detector

__all__ = ["DETECTORS", "NONE", "Detections", "Detector", "make_detector"]

DETECTORS: dict[str, Callable[[str], Detector]] = {
    "foreground": foreground.make,
    "faster_rcnn": faster_rcnn.make,
    "transformers": hugging_face.make,
    "onnx": yolo.make,
    "boxes": stored.make,
}
"""Factories by detector name; each takes the text after the colon, "" if there is none."""


def make_detector(spec: str) -> Detector:
    """Returns the detector that a spec names; another process can unpickle it or make it from the same spec.

    Args:
      spec: `foreground` (no weights), `faster_rcnn` or `faster_rcnn:WEIGHTS.pth` (torchvision's v2 with a ResNet-50),
        `transformers:FOLDER_OR_NAME` (any object detector of that library), `onnx:FILE.onnx` (of the YOLO family),
        `boxes:FILE.json` (boxes in COCO's format).

    Raises:
      UserError: there is no such detector, its file is missing or invalid, or its libraries are not installed.
    """
    name, _, argument = spec.partition(":")
    if name not in DETECTORS:
        raise UserError(f'There is no detector "{name}"; give one of {", ".join(DETECTORS)}.')
    return DETECTORS[name](argument)
