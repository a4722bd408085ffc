"""Makes detectors by name; a detector locates a product, or parts of it, in a picture."""

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
"""Detector name -> its factory, whose argument is the text after the colon in the spec, or ""."""


def make_detector(spec: str) -> Detector:
    """Returns the detector of a spec; it can be pickled.

    Args:
      spec: `foreground` (no weights), `faster_rcnn` or `faster_rcnn:WEIGHTS.pth` (version 2 of torchvision,
        with a ResNet-50), `transformers:FOLDER_OR_NAME` (any object detector of that library), `onnx:FILE.onnx` (a
        detector of the YOLO family), or `boxes:FILE.json` (boxes in COCO's format).

    Raises:
      UserError: the detector is unknown, its file is missing or invalid, or its libraries are not installed.
    """
    name, _, argument = spec.partition(":")
    if name not in DETECTORS:
        raise UserError(f'there is no detector "{name}"; give one of {", ".join(DETECTORS)}')
    return DETECTORS[name](argument)
