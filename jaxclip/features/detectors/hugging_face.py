"""Object detectors of the transformers library, such as DETR, RT-DETR, YOLOS and models fine-tuned from them."""

from collections.abc import Sequence

import numpy as np

from jaxclip.errors import UserError
from jaxclip.features.detectors.detections import Detections
from jaxclip.features.detectors.extra import not_installed

MIN_SCORE = 0.25


class HuggingFaceDetector:
    """The detector `transformers`: a model in a folder or on the Hub. Labels come from the model's configuration."""

    def __init__(self, name: str):
        try:
            import torch
            from transformers import AutoImageProcessor, AutoModelForObjectDetection
        except ImportError as error:
            raise not_installed("transformers", error) from error
        self._name = name
        try:
            self._processor = AutoImageProcessor.from_pretrained(name)
            model = AutoModelForObjectDetection.from_pretrained(name)
        except ImportError as error:
            raise not_installed("transformers", error) from error
        except (OSError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f'"{name}" is not a folder or a Hub name of an object detector of transformers: {reason}'
            ) from error
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)

    def __reduce__(self):
        return HuggingFaceDetector, (self._name,)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        # One picture at a time: padding pictures to one size would change the detections and take more memory.
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        import torch

        height, width = image.shape[:2]
        # A copy, because PyTorch warns about read-only arrays.
        inputs = self._processor(images=np.array(image), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            outputs = self._model(**inputs)
        (result,) = self._processor.post_process_object_detection(
            outputs, threshold=MIN_SCORE, target_sizes=[(height, width)]
        )
        boxes, scores, labels = (result[key].cpu().numpy() for key in ("boxes", "scores", "labels"))
        names = [self._model.config.id2label[int(number)] for number in labels]
        return Detections.of(boxes / np.array([width, height, width, height], np.float32), scores, names)


def make(argument: str) -> HuggingFaceDetector:
    """Returns the detector of the spec `transformers:FOLDER_OR_NAME`; the argument is the part after the colon."""
    if not argument:
        raise UserError("the detector transformers needs a model: transformers:FOLDER_OR_NAME")
    return HuggingFaceDetector(argument)
