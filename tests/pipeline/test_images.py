"""Decoded, cropped and resized pictures equal Pillow's."""

from io import BytesIO

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from jaxclip.config.schema import Augmentation
from jaxclip.features import crop
from jaxclip.models.resampling import scale
from jaxclip.pipeline import images
from jaxclip.pipeline.batches import image_batches
from jaxclip.pipeline.images import augment, decode, resize
from jaxclip.pipeline.records import Records

SMOOTH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize(
    (113, 151), Image.Resampling.BICUBIC
)


def encoded(image, form, **settings):
    buffer = BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


def resize_with_pillow(data, size):
    image = Image.open(BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "data",
    [
        encoded(SMOOTH, "JPEG"),
        encoded(SMOOTH, "JPEG", subsampling=0),
        encoded(SMOOTH, "JPEG", subsampling=1, progressive=True),
        encoded(SMOOTH.convert("L"), "JPEG"),
        encoded(SMOOTH, "PNG"),
        encoded(SMOOTH.convert("L"), "PNG"),
    ],
    ids=["jpeg", "jpeg 4:4:4", "jpeg progressive 4:2:2", "jpeg gray", "png", "png gray"],
)
def test_decoded_pixels_equal_pillows_in_three_channels(data):
    np.testing.assert_array_equal(decode(tf.constant(data)), Image.open(BytesIO(data)).convert("RGB"))


def test_evaluation_pictures_equal_pillows(prepared, preprocess):
    records = Records(prepared, "all")
    pictures = np.concatenate(list(image_batches(records, preprocess, batch_size=24)))
    for number, picture in enumerate(pictures):
        np.testing.assert_array_equal(picture, resize_with_pillow(records.pictures(number)[0], 32))


def test_policy_crop_equals_pillows_resize_of_the_shorter_side_and_centre_crop():
    cropped = tf.function(resize)(tf.constant(np.asarray(SMOOTH)), 32, "crop")  # in a graph, as in the pipeline
    height = 151 * 32 // 113
    scaled = np.asarray(SMOOTH.resize((32, height), Image.Resampling.BICUBIC))
    top = (height - 32) // 2
    np.testing.assert_array_equal(cropped, scaled[top : top + 32])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (31, 32), (33, 200)])
@pytest.mark.parametrize("policy", ["squash", "crop"])
def test_a_picture_of_any_shape_becomes_square(shape, policy):
    picture = np.full((*shape, 3), 77, np.uint8)
    np.testing.assert_array_equal(resize(tf.constant(picture), 32, policy), np.full((32, 32, 3), 77))
    settings = Augmentation((0.1, 1.0), (0.5, 2.0), True)
    cropped, _ = augment(
        tf.constant(encoded(Image.fromarray(picture), "PNG")), 32, policy, settings, tf.constant([3, 4])
    )
    np.testing.assert_array_equal(cropped, np.full((32, 32, 3), 77))


def views(augmentation, policy="squash", count=40):
    """Returns augmented views of a picture whose channels are each pixel's column and row, scaled to [0, 255]."""
    rows, columns = np.meshgrid(np.arange(96), np.arange(64), indexing="ij")
    picture = np.stack([columns * 255 / 63, rows * 255 / 95, rows * 0], axis=-1).astype(np.uint8)
    seeds = [tf.constant([0, 4 * position]) for position in range(count)]
    data = tf.constant(encoded(Image.fromarray(picture), "PNG"))
    return [augment(data, 32, policy, augmentation, seed)[0].numpy().astype(int) for seed in seeds]


def test_augmentation_is_a_pure_function_of_its_seed():
    settings = Augmentation((0.3, 0.9), (0.7, 1.4), True)
    np.testing.assert_array_equal(views(settings, count=5), views(settings, count=5))
    assert len({view.tobytes() for view in views(settings)}) == 40


@pytest.mark.parametrize("policy", ["squash", "crop"])
def test_a_crop_has_the_configured_area_at_random_places(policy):
    crops = views(Augmentation((0.25, 0.25), (1.0, 1.0), False), policy)
    widths = [np.ptp(view[..., 0]) / 255 for view in crops]
    heights = [np.ptp(view[..., 1]) / 255 for view in crops]
    np.testing.assert_allclose(np.multiply(widths, heights), 0.25, atol=0.05)
    for channel in (0, 1):
        starts = [view[..., channel].min() / 255 for view in crops]
        assert min(starts) < 0.1 and max(starts) > 0.2


def test_half_of_the_pictures_are_mirrored_with_flip_and_none_without():
    def mirrored(flip):
        return [view[0, 0, 0] > view[0, -1, 0] for view in views(Augmentation((0.5, 1.0), (1.0, 1.0), flip))]

    assert not any(mirrored(False))
    assert 10 <= sum(mirrored(True)) <= 30


def test_without_augmentation_pictures_are_resized_as_in_evaluation():
    none = Augmentation((1.0, 1.0), (1.0, 1.0), False)
    data, seed = tf.constant(encoded(SMOOTH, "PNG")), tf.constant([1, 2])
    np.testing.assert_array_equal(augment(data, 32, "squash", none, seed)[0], resize(decode(data), 32, "squash"))


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (0.25, 0.1, 0.7, 0.33), (0.5, 0.5, 0.5, 0.5), (0.999, 0, 1, 1), (-1, 0.2, 2, 0.21)]
)
def test_a_crop_is_the_part_of_the_picture_that_its_box_touches(box):
    picture = np.asarray(SMOOTH)
    np.testing.assert_array_equal(
        images.cut(tf.constant(picture), tf.constant(box, tf.float32)), crop.cut(picture, box)
    )


PHOTO = Image.fromarray(np.random.default_rng(1).integers(60, 200, (90, 60, 3), dtype=np.uint8)).resize(
    (600, 900), Image.Resampling.BICUBIC
)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [None, (0.25, 0.1, 0.7, 0.9)])
@pytest.mark.parametrize("policy", ["squash", "crop"])
@pytest.mark.parametrize("area", [(0.3, 0.9), (1.0, 1.0)])
def test_scaling_on_the_device_gives_the_pixels_of_scaling_on_the_host(form, part, policy, area):
    size, canvas = 48, 96
    settings = Augmentation(area, (0.8, 1.25) if area != (1.0, 1.0) else (1.0, 1.0), True)
    small = PHOTO.resize((61, 90))
    part = None if part is None else tf.constant(part)
    for image in (small, PHOTO):  # the first fits into the canvas, the second does not
        data = tf.constant(encoded(image, form))
        for number in range(4):
            seed = tf.constant([1, number])
            expected, whole = augment(data, size, policy, settings, seed, part=part)
            unscaled, extent = augment(data, size, policy, settings, seed, part=part, canvas=canvas)
            assert whole.numpy().tolist() == [size, size] and unscaled.shape == (canvas, canvas, 3)
            height, width = extent.numpy()
            assert not unscaled.numpy()[height:].any() and not unscaled.numpy()[:, width:].any()
            scaled = scale(unscaled[None].numpy(), extent[None].numpy(), size, "bicubic")[0]
            assert np.abs(np.asarray(scaled, int) - expected.numpy()).max() <= 2
        scaled_on_host = image is PHOTO or (area == (1.0, 1.0) and policy == "crop")
        assert (extent.numpy().tolist() == [size, size]) == scaled_on_host


@pytest.mark.parametrize(("ratio", "reduction"), [(1.5, 1), (2.5, 2), (5, 2), (9, 4), (17, 8)])
def test_large_jpegs_are_reduced_while_they_are_decoded(monkeypatch, ratio, reduction):
    decoded = []
    monkeypatch.setattr(
        images, "decode", lambda data, reduction=1: decoded.append(reduction) or decode(data, reduction)
    )
    size = int(600 / ratio)
    settings = Augmentation((0.999, 1.0), (1.0, 1.0), False)
    data = tf.constant(encoded(PHOTO, "JPEG", quality=95))
    reduced, _ = augment(data, size, "squash", settings, tf.constant([0, 0]))
    assert decoded == [reduction]
    difference = np.abs(reduced.numpy().astype(int) - np.asarray(PHOTO.resize((size, size), Image.Resampling.BICUBIC)))
    assert difference.mean() < 3


@pytest.mark.parametrize(
    "data",
    [encoded(SMOOTH, "JPEG"), encoded(SMOOTH.convert("L"), "JPEG", progressive=True), encoded(SMOOTH, "PNG")],
    ids=["jpeg", "jpeg gray progressive", "png"],
)
def test_the_shape_of_a_picture_is_read_from_its_header(data):
    assert images.read_shape(tf.constant(data[:4000])).numpy().tolist() == [151, 113]
