"""Version 2 of torchvision's Faster R-CNN (Ren et al. 2015), with a ResNet-50 and a feature pyramid."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxclip.errors import UserError, first_line
from jaxclip.features.detectors.detections import Detections
from jaxclip.features.detectors.extra import not_installed

MIN_SCORE = 0.25
_CLASS_WEIGHTS = "roi_heads.box_predictor.cls_score.weight"


class FasterRCNN:
    """The detector `faster_rcnn`, with torchvision's COCO weights or with weights from a file.

    torchvision downloads its COCO weights once. The class names of a weights file are read from a file of the same
    name with the extension .names, one per line, without the background. Without this file, the classes
    have COCO's names if there are as many as in COCO, and otherwise names such as "class 3".
    """

    def __init__(self, path: Path | None):
        try:
            import torch
            from torchvision.models import detection
        except ImportError as error:
            raise not_installed("faster_rcnn", error) from error
        weights = detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1
        coco = weights.meta["categories"]
        options = {"weights_backbone": None, "box_score_thresh": MIN_SCORE}
        self._path = path
        if path is None:
            model = _download(lambda: detection.fasterrcnn_resnet50_fpn_v2(weights=weights, **options))
            self._labels = coco
        else:
            state = _load_state(path)
            model = detection.fasterrcnn_resnet50_fpn_v2(num_classes=len(state[_CLASS_WEIGHTS]), **options)
            try:
                model.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(f"{path} does not match fasterrcnn_resnet50_fpn_v2: {first_line(error)}") from error
            self._labels = _read_labels(path, len(state[_CLASS_WEIGHTS]), coco)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)

    def __reduce__(self):
        return FasterRCNN, (self._path,)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        # One picture at a time: each needs half a GB, and padding pictures to one size would change the detections.
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        import torch

        height, width = image.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(self._device).float() / 255
        with torch.inference_mode():
            (result,) = self._model([pixels])
        boxes, scores, labels = (result[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
        return Detections.of(
            boxes / np.array([width, height, width, height], np.float32), scores, [self._labels[i] for i in labels]
        )


def make(argument: str) -> FasterRCNN:
    """Returns the detector of the spec `faster_rcnn` (the argument is "") or `faster_rcnn:WEIGHTS.pth`."""
    return FasterRCNN(Path(argument).expanduser() if argument else None)


def _download(build):
    try:
        return build()
    except OSError as error:
        raise UserError(
            f"torchvision cannot download the weights of Faster R-CNN ({first_line(error)}); "
            "give a weights file: faster_rcnn:WEIGHTS.pth"
        ) from error


def _load_state(path: Path) -> dict:
    import pickle

    import torch

    if not path.is_file():
        raise UserError(f"there are no Faster R-CNN weights at {path}: give a file of weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read as PyTorch weights: {first_line(error)}") from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    if _CLASS_WEIGHTS not in state:
        raise UserError(
            f'{path} does not contain "{_CLASS_WEIGHTS}"; give the state_dict of a fasterrcnn_resnet50_fpn_v2'
        )
    return state


def _read_labels(path: Path, classes: int, coco: list[str]) -> list[str]:
    names_file = path.with_suffix(".names")
    if names_file.is_file():
        names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(names) != classes - 1:
            raise UserError(
                f"{path} has {classes - 1} classes, not counting the background, but {names_file} names {len(names)}; "
                f"give one name per line, {classes - 1} in all"
            )
        return ["background", *names]
    return coco if classes == len(coco) else [f"class {number}" for number in range(classes)]
