"""Detectors locate products in drawn and real pictures, and every mistake in their files is a UserError."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxclip.catalog.drawn.stock import draw_product
from jaxclip.catalog.pictures import inspect
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.features.detect import Detections, make_detector
from jaxclip.features.detectors.foreground import foreground_mask
from jaxclip.features.detectors.yolo import OutputLayout, decode, letterbox, recognise_layout, suppress_overlaps
from jaxclip.features.geometry import iou

REAL = Path(os.environ.get("JAXCLIP_REAL_DATA") or "/nonexistent")
PHOTOS, YOLOX = REAL / "photos", REAL / "pretrained" / "yolox-nano" / "yolox_nano.onnx"
needs_real = pytest.mark.skipif(not YOLOX.exists(), reason="JAXCLIP_REAL_DATA is not a folder with the real data")


def drawn(index, seed=23):
    """Returns the picture, the true box as shares, and the true mask of a drawn product."""
    drawing = draw_product(seed, index)
    image = drawing.canvas.pixels.astype(np.uint8)
    height, width = image.shape[:2]
    left, top, wide, high = drawing.truth["box"]
    box = np.array([[left / width, top / height, (left + wide) / width, (top + high) / height]], np.float32)
    return image, box, drawing.canvas.covered >= 128


def photos():
    """Yields the pixels, the file name and the annotated boxes of real photos."""
    truth = json.loads((PHOTOS / "boxes_coco.json").read_text())
    for entry in truth["images"][:6]:
        annotations = [item for item in truth["annotations"] if item["image_id"] == entry["id"]]
        boxes = np.array([item["bbox"] for item in annotations], np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes /= [entry["width"], entry["height"]] * 2
        yield np.asarray(Image.open(PHOTOS / "photos" / entry["file_name"]).convert("RGB")), entry["file_name"], boxes


class TestDetections:
    def test_detections_are_sorted_and_clipped_without_empty_boxes_and_nan(self):
        boxes = [[-1, 0.2, 0.5, 2], [0.5, 0.5, 0.5, 1], [0, 0, 0.2, 0.2], [0, 0, np.nan, 1], [2, 2, 3, 3], [0, 0, 1, 1]]
        detections = Detections.of(boxes, [0.3, 0.9, 0.8, 1, 1, np.nan], list("abcdef"))
        assert detections.labels == ("c", "a")
        np.testing.assert_allclose(detections.boxes, [[0, 0, 0.2, 0.2], [0, 0.2, 0.5, 1]])
        assert detections.boxes.dtype == detections.scores.dtype == np.float32

    def test_lists_of_different_lengths_are_an_error(self):
        with pytest.raises(ValueError, match="2 labels"):
            Detections.of([[0, 0, 1, 1]], [1], ["a", "b"])


class TestForeground:
    def test_drawn_products_are_detected_with_a_mean_iou_of_nine_tenths(self):
        detect = make_detector("foreground")
        overlaps = []
        for index in range(40):
            image, box, _ = drawn(index)
            (detections,) = detect([image], [str(index)])
            assert detections.labels == ("product",) and 0 < detections.scores[0] <= 1
            overlaps.append(iou(box, detections.boxes)[0, 0])
        assert np.mean(overlaps) >= 0.9 and min(overlaps) >= 0.6

    def test_the_mask_covers_the_drawn_product_at_any_size(self):
        overlaps = []
        for index in range(20):
            image, _, truth = drawn(index)
            for size in ((60, 80), (300, 400)):
                mask = foreground_mask(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)))
                assert mask.shape == size[::-1] and mask.dtype == bool
                expected = np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
                overlaps.append((mask & expected).sum() / (mask | expected).sum())
        assert np.mean(overlaps) >= 0.8

    @pytest.mark.parametrize("level", [0, 120, 255])
    def test_nothing_is_detected_in_plain_pictures_gradients_and_noise(self, level):
        random = np.random.default_rng(level)
        plain = np.full((80, 60, 3), level, np.uint8)
        gradient = np.linspace(level * 0.7, level, 80)[:, None, None].repeat(60, 1).repeat(3, 2).astype(np.uint8)
        noise = random.integers(0, 256, (80, 60, 3), dtype=np.uint8)
        grain = np.clip(random.normal(level, 12, (80, 60, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
        for image in (plain, gradient, noise, grain):
            assert [len(detections) for detections in make_detector("foreground")([image], ["x"])] == [0]
            assert not foreground_mask(image).any()

    def test_a_product_that_leaves_the_picture_is_detected_on_any_background(self):
        y, x = np.mgrid[0:120, 0:90]
        random = np.random.default_rng(0)
        wall_and_floor = np.where((y < 70)[..., None], [225, 220, 210], [150, 110, 80])
        gradient = np.stack([180 + x // 2, 190 + y // 3, 200 - x // 3], axis=2)
        bricks = (
            np.where((y // 8 + x // 8) % 2, 150, 90)[..., None] + random.integers(-12, 12, (120, 90, 1)) + [20, 0, -10]
        )
        for background in (wall_and_floor, gradient, bricks):
            image = np.clip(background, 0, 255).astype(np.uint8)
            image[40:120, 28:62] = 20, 60, 160
            (detections,) = make_detector("foreground")([image], ["x"])
            assert iou(np.array([[28 / 90, 40 / 120, 62 / 90, 1]]), detections.boxes[:1]) >= 0.8

    def test_a_soft_shadow_is_not_part_of_the_product(self):
        y, x = np.mgrid[0:120, 0:120]
        shade = 60 * np.exp(-(((x - 75) / 30) ** 2) - ((y - 90) / 14) ** 2)
        image = (245 - shade[..., None]).repeat(3, axis=2).astype(np.uint8)
        image[30:90, 40:80] = 190, 30, 40
        (detections,) = make_detector("foreground")([image], ["x"])
        assert iou(np.array([[40 / 120, 0.25, 80 / 120, 0.75]]), detections.boxes) >= 0.9

    def test_a_hole_in_a_dark_product_is_background_but_the_inside_of_a_pale_outline_is_not(self):
        y, x = np.mgrid[0:100, 0:100]
        ring = np.abs(np.hypot(x - 50, y - 50) - 30)
        bag = np.where((ring < 8)[..., None], [30, 30, 30], 255).astype(np.uint8)
        shirt = np.where((ring < 1.5)[..., None], [222, 222, 222], 255).astype(np.uint8)
        assert not foreground_mask(bag)[50, 50] and foreground_mask(bag)[50, 20]
        assert foreground_mask(shirt)[50, 50]

    @given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 255))
    @settings(max_examples=25, deadline=None)
    def test_the_mask_has_the_size_of_the_picture(self, height, width, level):
        image = np.full((height, width, 3), level, np.uint8)
        image[height // 2 :, width // 2 :] = 255 - level
        assert foreground_mask(image).shape == (height, width)

    @needs_real
    def test_people_in_street_photos_are_detected_with_a_mean_iou_of_a_half(self):
        overlaps = []
        for image, name, boxes in photos():
            (detections,) = make_detector("foreground")([image], [name])
            union = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            overlaps.append(iou(union, detections.boxes).max(initial=0))
        assert np.mean(overlaps) >= 0.5


class TestStoredBoxes:
    def write(self, path, **changes):
        """Writes a file of boxes with some changes and returns its detector."""
        content = {
            "images": [
                {"id": 1, "file_name": "images/10001.jpg", "width": 100, "height": 200},
                {"id": 2, "file_name": "other/10001.png", "width": 10, "height": 10},
                {"id": 3, "file_name": "7.5.png", "width": 10, "height": 10},
            ],
            "annotations": [
                {"image_id": 1, "category_id": 4, "bbox": [10, 20, 50, 100]},
                {"image_id": 1, "category_id": 5, "bbox": [10, 20, 20, 20], "score": 0.5},
                {"image_id": 3, "category_id": 5, "bbox": [0, 0, 5, 10]},
            ],
            "categories": [{"id": 4, "name": "watch"}, {"id": 5, "name": "dial"}],
        }
        path.write_text(json.dumps(content | changes))
        return make_detector(f"boxes:{path}")

    def test_boxes_are_looked_up_by_file_name_with_and_without_folder_and_extension(self, tmp_path):
        detect = self.write(tmp_path / "boxes.json")
        detect = pickle.loads(pickle.dumps(detect))
        names = ["images/10001.jpg", "10001.jpg", "/data/7.5.png", "7.5", "10001", "unknown.jpg", ""]
        results = detect([np.zeros((4, 4, 3), np.uint8)] * len(names), names)
        assert [len(result) for result in results] == [2, 2, 1, 1, 0, 0, 0], "10001 is the name of two pictures"
        assert results[0].labels == ("watch", "dial")
        np.testing.assert_allclose(results[0].boxes, [[0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.3, 0.2]])
        np.testing.assert_allclose(results[0].scores, [1, 0.5])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"images": None}, 'a list of objects under "images"'),
            ({"images": [{"id": 1, "file_name": "a.jpg", "width": 0, "height": 2}]}, "width"),
            ({"images": [{"file_name": "a.jpg", "width": 1, "height": 2}]}, '"id"'),
            ({"annotations": [{"image_id": 9, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, "image 9"),
            ({"annotations": [{"image_id": 1, "category_id": 9, "bbox": [0, 0, 1, 1]}]}, "category 9"),
            ({"annotations": [{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1]}]}, "bbox"),
            ({"annotations": [{"image_id": 1, "category_id": 4, "bbox": [0, 0, 1, 1], "score": "high"}]}, "score"),
            ({"categories": [{"id": 4}]}, '"name"'),
        ],
    )
    def test_the_error_for_an_invalid_file_names_the_file_and_the_entry(self, tmp_path, changes, words):
        with pytest.raises(UserError, match="boxes.json") as raised:
            self.write(tmp_path / "boxes.json", **changes)
        assert words in str(raised.value)

    def test_a_missing_file_and_invalid_json_are_errors(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            make_detector(f"boxes:{tmp_path / 'none.json'}")
        (tmp_path / "text.json").write_text("boxes")
        with pytest.raises(UserError, match="not valid JSON"):
            make_detector(f"boxes:{tmp_path / 'text.json'}")

    @needs_real
    def test_all_real_coco_boxes_are_read(self):
        detect = make_detector(f"boxes:{PHOTOS / 'boxes_coco.json'}")
        for image, name, boxes in photos():
            (detections,) = detect([image], [name])
            np.testing.assert_allclose(np.sort(detections.boxes, axis=0), np.sort(boxes, axis=0), atol=1e-6)


class TestYolo:
    @pytest.mark.parametrize(
        ("shape", "layout"),
        [
            ((1, 3549, 85), OutputLayout("yolox", 80, (8, 16, 32))),
            ((1, 3 * 3549, 85), OutputLayout("yolov5", 80)),
            ((1, 17, 3549), OutputLayout("yolov8", 13)),
            ((1, 300, 6), OutputLayout("corners", 0)),
            ((1, 300, 7), None),
            ((3549, 85), None),
            ((2, 3549, 85), None),
        ],
    )
    def test_the_family_is_recognised_by_the_shape_of_the_output(self, shape, layout):
        assert recognise_layout([shape], 416, 416) == layout

    def test_a_letterboxed_picture_keeps_its_aspect_and_is_framed_in_grey(self):
        image = np.full((50, 100, 3), 200, np.uint8)
        framed, scale, (left, top) = letterbox(image, 64, 64, middle=True)
        assert (scale, left, top) == (0.64, 0, 16)
        assert (framed[16:48] == 200).all() and (framed[:16] == 114).all() and (framed[48:] == 114).all()
        assert letterbox(image, 64, 64, middle=False)[2] == (0, 0)

    def test_the_same_box_is_decoded_from_the_output_of_every_family(self):
        size, box, number = 64, np.array([20.0, 30.0, 24.0, 16.0]), 2
        corners = [8, 22, 32, 38]
        strides, cells = (8, 16, 32), 64 + 16 + 4
        raw = np.zeros((cells, 5 + 3), np.float32)
        raw[3 * 8 + 2] = [20 / 8 - 2, 30 / 8 - 3, np.log(24 / 8), np.log(16 / 8), 0.9, 0, 0, 0.8]
        decoded = np.zeros((cells, 8), np.float32)
        decoded[26] = [*box, 0.9, 0, 0, 0.8]
        plain = np.zeros((7, cells), np.float32)
        plain[:, 26] = [*box, 0, 0, 0.72]
        outputs = [
            (raw, OutputLayout("yolox", 3, strides)),
            (decoded, OutputLayout("yolox", 3, strides)),
            (np.repeat(decoded, 3, axis=0), OutputLayout("yolov5", 3)),
            (plain, OutputLayout("yolov8", 3)),
            (np.array([[*corners, 0.72, number]], np.float32), OutputLayout("corners", 0)),
        ]
        for output, layout in outputs:
            boxes, scores, classes = decode(output, layout, size, size)
            (index,) = suppress_overlaps(boxes, scores, classes)
            np.testing.assert_allclose(boxes[index], corners, atol=1e-4)
            assert scores[index] == pytest.approx(0.72) and classes[index] == number

    def test_of_overlapping_boxes_of_one_class_only_the_most_confident_is_kept(self):
        corners = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 1, 1]], np.float32)
        kept = suppress_overlaps(corners, np.array([0.6, 0.9, 0.5, 0.3, 0.1]), np.array([1, 1, 2, 1, 1]))
        assert kept.tolist() == [1, 2, 3]

    def test_a_missing_file_and_an_invalid_model_are_errors(self, tmp_path):
        pytest.importorskip("onnxruntime")
        with pytest.raises(UserError, match="no ONNX file at"):
            make_detector(f"onnx:{tmp_path / 'none.onnx'}")
        (tmp_path / "text.onnx").write_text("no model")
        with pytest.raises(UserError, match="not an ONNX model"):
            make_detector(f"onnx:{tmp_path / 'text.onnx'}")

    @needs_real
    def test_yolox_detects_the_wearer_in_real_photos(self):
        pytest.importorskip("onnxruntime")
        detect = pickle.loads(pickle.dumps(make_detector(f"onnx:{YOLOX}")))
        for image, name, boxes in photos():
            (detections,) = detect([image], [name])
            assert detections.labels[0] == "person" and detections.scores[0] > 0.8
            union = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            people = detections.boxes[np.array(detections.labels) == "person"]
            assert iou(union, people).max() >= 0.5

    @needs_real
    def test_a_names_file_is_used_and_must_name_every_class(self, tmp_path):
        pytest.importorskip("onnxruntime")
        (tmp_path / "mine.onnx").symlink_to(YOLOX)
        (tmp_path / "mine.names").write_text("\n".join(f"thing {number}" for number in range(80)))
        image, name, _ = next(photos())
        assert make_detector(f"onnx:{tmp_path / 'mine.onnx'}")([image], [name])[0].labels[0] == "thing 0"
        (tmp_path / "mine.names").write_text("dress\n")
        with pytest.raises(UserError, match="80 classes, but .*mine.names names 1"):
            make_detector(f"onnx:{tmp_path / 'mine.onnx'}")


def describe_drawn(spec, folder, indices):
    """Returns the stored values of drawn products, described with a detector."""
    paths = [folder / f"{index}.png" for index in indices]
    for index, path in zip(indices, paths, strict=True):
        Image.fromarray(drawn(index)[0][: 60 + 20 * index]).save(path)
    describe = pickle.loads(pickle.dumps(ProductDescriber(detector=spec, policy="category")))
    products = [Product(path.stem, (path,), (), category="Dials") for path in paths]
    return [description.values for description in describe(products, [[inspect(path)] for path in paths])]


class TestFasterRCNN:
    @pytest.mark.slow
    def test_a_weights_file_detects_the_classes_of_its_names_file(self, tmp_path):
        torch = pytest.importorskip("torch")
        detection = pytest.importorskip("torchvision.models.detection")
        model = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
        torch.nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)
        model.roi_heads.box_predictor.cls_score.bias.data = torch.tensor([0.0, 0.0, 2.0])  # everything is a dial
        torch.save(model.state_dict(), tmp_path / "mine.pth")
        (tmp_path / "mine.names").write_text("sleeve\ndial\n")
        (values,) = describe_drawn(f"faster_rcnn:{tmp_path / 'mine.pth'}", tmp_path, [0])
        assert set(values["box_labels"]) == {"dial"} and values["crop_labels"] == ["dial"]
        np.testing.assert_allclose(values["box_scores"], np.exp(2) / (2 + np.exp(2)), rtol=1e-5)
        assert ((values["boxes"] >= 0) & (values["boxes"] <= 1)).all() and len(values["boxes"])
        (tmp_path / "mine.names").write_text("sleeve\n")
        with pytest.raises(UserError, match="2 classes"):
            make_detector(f"faster_rcnn:{tmp_path / 'mine.pth'}")

    def test_files_without_weights_of_faster_rcnn_are_errors(self, tmp_path):
        torch = pytest.importorskip("torch")
        pytest.importorskip("torchvision")
        with pytest.raises(UserError, match="no Faster R-CNN weights at"):
            make_detector(f"faster_rcnn:{tmp_path / 'none.pth'}")
        torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
        with pytest.raises(UserError, match="state_dict"):
            make_detector(f"faster_rcnn:{tmp_path / 'other.pth'}")
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(UserError, match="PyTorch weights"):
            make_detector(f"faster_rcnn:{tmp_path / 'text.pth'}")


class TestTransformers:
    def test_a_saved_detector_uses_its_labels_and_does_not_depend_on_the_batch(self, tmp_path):
        pytest.importorskip("torch")
        from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

        config = YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 64],
            num_detection_tokens=5, id2label={0: "sleeve", 1: "dial"}, label2id={"sleeve": 0, "dial": 1},
        )  # fmt: skip
        YolosForObjectDetection(config).save_pretrained(tmp_path)
        YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}).save_pretrained(tmp_path)
        together = describe_drawn(f"transformers:{tmp_path}", tmp_path, [0, 1, 2])
        for index, values in enumerate(together):
            assert set(values["box_labels"]) <= {"sleeve", "dial"} and len(values["boxes"]) == 5
            (alone,) = describe_drawn(f"transformers:{tmp_path}", tmp_path, [index])
            for name, value in values.items():
                np.testing.assert_array_equal(value, alone[name], err_msg=f"{name} depends on the batch")

    def test_a_folder_without_a_detector_is_an_error(self, tmp_path):
        pytest.importorskip("torch")
        with pytest.raises(UserError, match="not a folder or a Hub name"):
            make_detector(f"transformers:{tmp_path}")
