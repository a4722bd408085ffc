"""Encoded pictures into square uint8 ones, in a tf.data graph."""

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
from PIL import Image

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class ImageAugmentation:
    """Random resized crop and mirroring (see `config.Augmentation`)."""

    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    flip: bool


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the RGB picture of JPEG or PNG bytes, (H, W, 3) uint8.

    JPEGs are decoded with libjpeg's accurate transform, to the same pixels as Pillow; TensorFlow's default is a faster
    one that is up to six levels off.
    """
    picture = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_png(encoded, channels=3),
    )
    return tf.ensure_shape(picture, (None, None, 3))


def cut(picture: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Returns the part of a picture that a box (left, top, right, bottom as shares of it) touches, a pixel at least."""
    height, width = tf.unstack(tf.shape(picture)[:2])
    extent = tf.cast(tf.stack([width, height]), tf.float32)
    # A thousandth of a pixel is rounding (shares are float32), not a pixel touched.
    start = tf.clip_by_value(tf.cast(tf.floor(box[:2] * extent + 1e-3), tf.int32), 0, [width - 1, height - 1])
    end = tf.clip_by_value(tf.cast(tf.math.ceil(box[2:] * extent - 1e-3), tf.int32), start + 1, [width, height])
    return picture[start[1] : end[1], start[0] : end[0]]


def resize(picture: tf.Tensor, size: int, policy: str, filter: str = "bicubic") -> tf.Tensor:
    """Returns the picture as (size, size, 3) uint8, resized with antialiasing.

    Policy "squash" ignores its shape; "crop" scales the shorter side to `size` and cuts the centre, as CLIP does. The
    filter is bicubic or bilinear.
    """
    if policy == "squash":
        return tf.ensure_shape(_scale(picture, tf.constant([size, size]), filter), (size, size, 3))
    shape = tf.shape(picture)[:2]
    picture = _scale(picture, size * shape // tf.reduce_min(shape), filter)
    top, left = tf.unstack((tf.shape(picture)[:2] - size) // 2)
    return tf.ensure_shape(picture[top : top + size, left : left + size], (size, size, 3))


def augment(
    picture: tf.Tensor,
    size: int,
    policy: str,
    augmentation: ImageAugmentation,
    seed: tf.Tensor,
    filter: str = "bicubic",
) -> tf.Tensor:
    """Returns a random crop of the picture as (size, size, 3) uint8, perhaps mirrored; a pure function of `seed` (2,).

    The crop's area is drawn uniformly and its aspect log-uniformly: relative to the whole picture's where that is
    squashed to a square anyway, relative to a square where the policy keeps shapes. A side never exceeds the picture's.
    """
    if augmentation.crop_area == (1.0, 1.0) and augmentation.crop_aspect == (1.0, 1.0):
        picture = resize(picture, size, policy, filter)
    else:
        draws = tf.random.stateless_uniform([4], seed)
        shape = tf.cast(tf.shape(picture)[:2], tf.float32)
        base = shape if policy == "squash" else tf.fill([2], tf.sqrt(shape[0] * shape[1]))
        area = _between(draws[0], *augmentation.crop_area)
        aspect = tf.exp(_between(draws[1], *(math.log(limit) for limit in augmentation.crop_aspect)))
        wanted = base * tf.sqrt(tf.stack([area / aspect, area * aspect]))  # height, width
        extent = tf.clip_by_value(tf.round(wanted), 1.0, shape)
        begin = tf.floor(draws[2:] * (shape - extent + 1.0))
        (top, left), (bottom, right) = (tf.unstack(tf.cast(edge, tf.int32)) for edge in (begin, begin + extent))
        picture = _scale(picture[top:bottom, left:right], tf.constant([size, size]), filter)
    if augmentation.flip:
        picture = tf.image.stateless_random_flip_left_right(picture, seed + 1)
    return tf.ensure_shape(picture, (size, size, 3))


def _between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * draw


def _scale(picture: tf.Tensor, size: tf.Tensor, filter: str) -> tf.Tensor:
    """Returns the picture resized to (height, width) by Pillow itself, which is twice as fast as TensorFlow's ops."""

    def scale(pixels: np.ndarray, size: np.ndarray) -> np.ndarray:
        height, width = size.tolist()
        return np.asarray(Image.fromarray(pixels).resize((width, height), FILTERS[filter]))

    scaled = tf.numpy_function(scale, [picture, size], tf.uint8, stateful=False)
    return tf.ensure_shape(scaled, (None, None, 3))
