"""Detectors of the YOLO family in ONNX files, run by onnxruntime.

The family, and with it the input and output format, is recognised by the output's shape. For an input of height H and
width W, A is the sum of (H / s)(W / s) over the strides s:

| output       | family              | input                                  | boxes                            |
|--------------|---------------------|----------------------------------------|----------------------------------|
| (1, A, 5+C)  | YOLOX               | BGR 0-255, letterboxed at the top left | raw or decoded, objectness       |
| (1, 3A, 5+C) | YOLOv5, v7          | RGB 0-1, letterboxed in the middle     | decoded, objectness              |
| (1, 4+C, A)  | YOLOv8, v9, v11     | RGB 0-1, letterboxed in the middle     | decoded                          |
| (1, N, 6)    | YOLOv10, end to end | RGB 0-1, letterboxed in the middle     | corners, score, class, after NMS |

The YOLOX paper is Ge et al., 2021; in its raw output centres are in cells and sizes are logarithms.
"""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jaxclip.errors import UserError, first_line
from jaxclip.features.detectors.detections import Detections
from jaxclip.features.detectors.extra import not_installed
from jaxclip.features.geometry import iou

LEAST_SCORE = 0.25
MOST_OVERLAP = 0.45
"""Intersection over union above which the lower-scored of two boxes of one class is dropped."""
MOST_BOXES = 100

_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
_GREY = 114
_USUAL_SIDE = 640
_LARGEST_LOGARITHM = (
    16.0  # Raw sizes, which are logarithms, are below this; decoded output always has a size in pixels above it.
)

# The 80 classes of COCO in the order that all YOLO models use.
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


@dataclass(frozen=True)
class OutputLayout:
    """The output format of a model: its family, number of classes (0 if each box carries its class) and strides."""

    family: str
    classes: int
    strides: tuple[int, ...] = ()


class Yolo:
    """The detector `onnx`. Class names come from FILE.names, else from the file's metadata, else from COCO."""

    def __init__(self, path: Path):
        self._path = path
        self._session = _session(path)
        entry = self._session.get_inputs()[0]
        if len(entry.shape) != 4 or entry.type != "tensor(float)" or entry.shape[1] not in (3, None, "channels"):
            raise UserError(f"{path} takes {entry.type} of shape {entry.shape}; float (1, 3, height, width) is needed.")
        self._input = entry.name
        height, width = (side if isinstance(side, int) else _USUAL_SIDE for side in entry.shape[2:])
        self._size = height, width
        outputs = self._run(np.full((1, 3, height, width), 0.5, np.float32))
        layout = recognise([output.shape for output in outputs], height, width)
        if layout is None:
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise UserError(
                f"{path} gives {shapes} for a picture of {width}x{height}, which is no detector of the YOLO family; "
                f"give one whose output is (1, A, 5+C), (1, 3A, 5+C), (1, 4+C, A) or (1, N, 6)."
            )
        self._layout = layout
        self._names = _names(path, self._session.get_modelmeta().custom_metadata_map, layout.classes)

    def __reduce__(self):
        return Yolo, (self._path,)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        middle = self._layout.family != "yolox"
        boxed, scale, (left, top) = letterbox(image, *self._size, middle=middle)
        pixels = boxed.astype(np.float32) / 255 if middle else boxed[..., ::-1].astype(np.float32)
        (output, *_) = self._run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        corners, scores, classes = decode(output[0], self._layout, *self._size)
        kept = best(corners, scores, classes)
        height, width = image.shape[:2]
        shares = (corners[kept] - [left, top, left, top]) / scale / [width, height, width, height]
        labels = [self._names.get(int(number), str(number)) for number in classes[kept]]
        return Detections.of(shares, scores[kept], labels)

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: pixels})


def make(argument: str) -> Yolo:
    """Returns the detector of `onnx:FILE.onnx`."""
    if not argument:
        raise UserError("the detector onnx needs a file: onnx:FILE.onnx")
    return Yolo(Path(argument).expanduser())


def recognise(shapes: Sequence[tuple[int, ...]], height: int, width: int) -> OutputLayout | None:
    """Returns the layout of outputs of these shapes for an input of `height` x `width`; None if it is unknown."""
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] != 1:
        return None
    _, rows, columns = shapes[0]
    for strides in _STRIDES:
        cells = sum((height // stride) * (width // stride) for stride in strides)
        if rows == cells and columns > 5:
            return OutputLayout("yolox", columns - 5, strides)
        if rows == 3 * cells and columns > 5:
            return OutputLayout("yolov5", columns - 5)
        if columns == cells and rows > 4:
            return OutputLayout("yolov8", rows - 4)
    return OutputLayout("corners", 0) if columns == 6 else None


def letterbox(image: np.ndarray, height: int, width: int, *, middle: bool) -> tuple[np.ndarray, float, tuple[int, int]]:
    """Returns the picture scaled into a grey `height` x `width` frame, its scale, and its left and top edge."""
    scale = min(height / image.shape[0], width / image.shape[1])
    high, wide = max(round(image.shape[0] * scale), 1), max(round(image.shape[1] * scale), 1)
    left, top = ((width - wide) // 2, (height - high) // 2) if middle else (0, 0)
    boxed = np.full((height, width, 3), _GREY, np.uint8)
    resized = Image.fromarray(image).resize((wide, high), Image.Resampling.BILINEAR)
    boxed[top : top + high, left : left + wide] = np.asarray(resized)
    return boxed, scale, (left, top)


def decode(
    output: np.ndarray, layout: OutputLayout, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns corners (N, 4) in pixels of the input, scores (N,) and class numbers (N,) of one picture's output."""
    if layout.family == "corners":
        return output[:, :4], output[:, 4], output[:, 5].astype(np.int64)
    if layout.family == "yolov8":
        output = output.T
    boxes, classes = output[:, :4], output[:, -layout.classes :]
    if layout.family == "yolox" and boxes[:, 2:].max() < _LARGEST_LOGARITHM:
        boxes = _from_cells(boxes, layout.strides, height, width)
    numbers = classes.argmax(axis=1)
    scores = classes[np.arange(len(classes)), numbers]
    if layout.family != "yolov8":
        scores = scores * output[:, 4]
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1), scores, numbers


def _from_cells(boxes: np.ndarray, strides: Sequence[int], height: int, width: int) -> np.ndarray:
    """Returns (A, 4) centres and sizes in pixels of raw boxes: one per cell, ordered by stride, row and column."""
    cells, steps = [], []
    for stride in strides:
        y, x = np.mgrid[0 : height // stride, 0 : width // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        steps.append(np.full((x.size, 1), stride))
    cell, step = np.concatenate(cells), np.concatenate(steps)
    return np.concatenate([(boxes[:, :2] + cell) * step, np.exp(boxes[:, 2:]) * step], axis=1).astype(np.float32)


def best(corners: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the indices of the boxes that survive non-maximum suppression, best first."""
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= LEAST_SCORE][:1000]
    kept: list[int] = []
    while len(order) and len(kept) < MOST_BOXES:
        first, order = order[0], order[1:]
        kept.append(first)
        double = (iou(corners[first], corners[order])[0] > MOST_OVERLAP) & (classes[order] == classes[first])
        order = order[~double]
    return np.array(kept, np.int64)


def _session(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise not_installed("onnx", error) from error
    if not path.is_file():
        raise UserError(f"there is no ONNX file at {path}")
    options = onnxruntime.SessionOptions()
    # One thread: several processes detect in parallel, and more threads would only compete for the cores.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    except Exception as error:  # the only common base class of onnxruntime's errors.
        raise UserError(f"{path} is no ONNX model that onnxruntime can run: {first_line(error)}") from error


def _names(path: Path, metadata: dict[str, str], classes: int) -> dict[int, str]:
    names_file = path.with_suffix(".names")
    if names_file.is_file():
        names = dict(
            enumerate(line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip())
        )
        source = str(names_file)
    elif "names" in metadata:
        names, source = _from_metadata(path, metadata["names"]), f"the metadata of {path}"
    else:
        names, source = dict(enumerate(COCO)), "COCO"
    if classes and len(names) != classes:
        raise UserError(
            f"{path} has {classes} classes and {source} names {len(names)}; name them in {names_file}, one per line"
        )
    return names


def _from_metadata(path: Path, names: str) -> dict[int, str]:
    try:
        listed = ast.literal_eval(names)
        pairs = listed.items() if isinstance(listed, dict) else enumerate(listed)
        return {int(number): str(name) for number, name in pairs}
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f'{path} has metadata "names" that is no list of classes: {names[:60]}.') from error
