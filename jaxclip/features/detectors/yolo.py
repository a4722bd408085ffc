"""Detectors of the YOLO family in ONNX files, run by onnxruntime.

The shape of the output tells the family, and thereby the input and output format. For an input of height H and width
W, A is the sum of (H / s)(W / s) over the strides s; C is the number of classes and N the number of boxes:

| output       | family              | input                                  | boxes                            |
|--------------|---------------------|----------------------------------------|----------------------------------|
| (1, A, 5+C)  | YOLOX               | BGR 0-255, letterboxed at the top left | raw or decoded, objectness       |
| (1, 3A, 5+C) | YOLOv5, v7          | RGB 0-1, letterboxed in the middle     | decoded, objectness              |
| (1, 4+C, A)  | YOLOv8, v9, v11     | RGB 0-1, letterboxed in the middle     | decoded                          |
| (1, N, 6)    | YOLOv10, end to end | RGB 0-1, letterboxed in the middle     | corners, score, class, after NMS |

For YOLOX see Ge et al. 2021; in its raw output, centres are in units of cells and sizes are logarithms.
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

MIN_SCORE = 0.25
MAX_OVERLAP = 0.45
"""Intersection over union above which the lower-scored of two boxes of one class is dropped."""
MAX_BOXES = 100

_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
_GREY = 114  # of the frame around a letterboxed picture
_DEFAULT_SIDE = 640  # of the input, in pixels, if the model accepts any size
_MAX_RAW_SIZE = 16.0  # raw sizes, which are logarithms, are below; decoded output always has a size in pixels above

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
    """The output format of a model.

    Attributes:
      family: "yolox", "yolov5", "yolov8", or "corners" for YOLOv10.
      classes: number of classes; 0 for "corners", whose output holds the index of each box's class.
      strides: strides of the cells in pixels, for "yolox" only.
    """

    family: str
    classes: int
    strides: tuple[int, ...] = ()


class Yolo:
    """The detector `onnx`: a model of the YOLO family in an ONNX file, such as FILE.onnx.

    Class names are read from FILE.names if it exists, or else from the metadata of the model. Without either, they are
    those of COCO.
    """

    def __init__(self, path: Path):
        self._path = path
        self._session = _session(path)
        tensor = self._session.get_inputs()[0]
        if len(tensor.shape) != 4 or tensor.type != "tensor(float)" or tensor.shape[1] not in (3, None, "channels"):
            raise UserError(
                f"{path} has an input of type {tensor.type} and shape {tensor.shape}; "
                "it must be tensor(float) of shape (1, 3, height, width)"
            )
        self._input = tensor.name
        height, width = (side if isinstance(side, int) else _DEFAULT_SIDE for side in tensor.shape[2:])
        self._size = height, width
        outputs = self._run(np.full((1, 3, height, width), 0.5, np.float32))
        layout = recognise_layout([output.shape for output in outputs], height, width)
        if layout is None:
            shapes = ", ".join(str(output.shape) for output in outputs)
            raise UserError(
                f"{path} is not a detector of the YOLO family: for an input of {width}x{height} pixels its output is "
                f"{shapes}; give a model whose output is (1, A, 5+C), (1, 3A, 5+C), (1, 4+C, A) or (1, N, 6), "
                "with A grid cells, C classes and N boxes"
            )
        self._layout = layout
        self._names = _read_names(path, self._session.get_modelmeta().custom_metadata_map, layout.classes)

    def __reduce__(self):
        return Yolo, (self._path,)

    def __call__(self, images: Sequence[np.ndarray], names: Sequence[str]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Detections:
        middle = self._layout.family != "yolox"
        framed, scale, (left, top) = letterbox(image, *self._size, middle=middle)
        pixels = framed.astype(np.float32) / 255 if middle else framed[..., ::-1].astype(np.float32)
        (output, *_) = self._run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))
        corners, scores, classes = decode(output[0], self._layout, *self._size)
        kept = suppress_overlaps(corners, scores, classes)
        height, width = image.shape[:2]
        shares = (corners[kept] - [left, top, left, top]) / scale / [width, height, width, height]
        labels = [self._names.get(int(number), str(number)) for number in classes[kept]]
        return Detections.of(shares, scores[kept], labels)

    def _run(self, pixels: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {self._input: pixels})


def make(argument: str) -> Yolo:
    """Returns the detector of the spec `onnx:FILE.onnx`; the argument is the part after the colon."""
    if not argument:
        raise UserError("the detector onnx needs a file: onnx:FILE.onnx")
    return Yolo(Path(argument).expanduser())


def recognise_layout(shapes: Sequence[tuple[int, ...]], height: int, width: int) -> OutputLayout | None:
    """Returns the layout of outputs with these shapes for an input of `height` x `width` pixels; None if unknown."""
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
    """Returns the picture scaled to fit a grey frame, its scale, and (left, top) of the picture in the frame.

    Args:
      image: (height, width, 3) uint8.
      height, width: size of the frame, in pixels.
      middle: whether the picture is centred in the frame or at the top left.
    """
    scale = min(height / image.shape[0], width / image.shape[1])
    new_height, new_width = max(round(image.shape[0] * scale), 1), max(round(image.shape[1] * scale), 1)
    left, top = ((width - new_width) // 2, (height - new_height) // 2) if middle else (0, 0)
    framed = np.full((height, width, 3), _GREY, np.uint8)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    framed[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return framed, scale, (left, top)


def decode(
    output: np.ndarray, layout: OutputLayout, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns corners (N, 4) in pixels of the input, scores (N,) and class indices (N,) of one picture's output."""
    if layout.family == "corners":
        return output[:, :4], output[:, 4], output[:, 5].astype(np.int64)
    if layout.family == "yolov8":
        output = output.T
    boxes, classes = output[:, :4], output[:, -layout.classes :]
    if layout.family == "yolox" and boxes[:, 2:].max() < _MAX_RAW_SIZE:
        boxes = _from_cells(boxes, layout.strides, height, width)
    numbers = classes.argmax(axis=1)
    scores = classes[np.arange(len(classes)), numbers]
    if layout.family != "yolov8":
        scores = scores * output[:, 4]
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1), scores, numbers


def _from_cells(boxes: np.ndarray, strides: Sequence[int], height: int, width: int) -> np.ndarray:
    """Returns (A, 4) centres and sizes, in pixels, of raw boxes: one per cell, ordered by stride, row and column."""
    cells, steps = [], []
    for stride in strides:
        y, x = np.mgrid[0 : height // stride, 0 : width // stride]
        cells.append(np.stack([x.ravel(), y.ravel()], axis=1))
        steps.append(np.full((x.size, 1), stride))
    cell, step = np.concatenate(cells), np.concatenate(steps)
    return np.concatenate([(boxes[:, :2] + cell) * step, np.exp(boxes[:, 2:]) * step], axis=1).astype(np.float32)


def suppress_overlaps(corners: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the indices of the boxes that survive non-maximum suppression within each class, best first.

    Only the 1000 best boxes with a score of at least MIN_SCORE take part, and at most MAX_BOXES are returned.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= MIN_SCORE][:1000]
    kept: list[int] = []
    while len(order) and len(kept) < MAX_BOXES:
        first, order = order[0], order[1:]
        kept.append(first)
        duplicate = (iou(corners[first], corners[order])[0] > MAX_OVERLAP) & (classes[order] == classes[first])
        order = order[~duplicate]
    return np.array(kept, np.int64)


def _session(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise not_installed("onnx", error) from error
    if not path.is_file():
        raise UserError(f"there is no ONNX file at {path}: give an existing file as onnx:FILE.onnx")
    options = onnxruntime.SessionOptions()
    # One thread: several processes detect in parallel, and more threads would only compete for the cores.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    except Exception as error:  # the only common base class of onnxruntime's errors.
        raise UserError(f"{path} is not an ONNX model that onnxruntime can run: {first_line(error)}") from error


def _read_names(path: Path, metadata: dict[str, str], classes: int) -> dict[int, str]:
    names_file = path.with_suffix(".names")
    if names_file.is_file():
        names = dict(
            enumerate(line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip())
        )
        source = str(names_file)
    elif "names" in metadata:
        names, source = _parse_names(path, metadata["names"]), f"the metadata of {path}"
    else:
        names, source = dict(enumerate(COCO)), "COCO"
    if classes and len(names) != classes:
        raise UserError(
            f"{path} has {classes} classes, but {source} names {len(names)}; "
            f"name all {classes} in {names_file}, one per line"
        )
    return names


def _parse_names(path: Path, names: str) -> dict[int, str]:
    try:
        classes = ast.literal_eval(names)
        pairs = classes.items() if isinstance(classes, dict) else enumerate(classes)
        return {int(number): str(name) for number, name in pairs}
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(f'{path} has metadata "names" that is not a list of classes: {names[:60]}') from error
