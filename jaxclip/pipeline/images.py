"""Decodes, crops and resizes pictures to square uint8 arrays in a tf.data graph."""

import math
from functools import partial

import numpy as np
from PIL import Image

from jaxclip.config.schema import Augmentation
from jaxclip.runtime.tensorflow import tf

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
REDUCTIONS = {1: 0, 2: 2, 4: 8, 8: 16}
"""libjpeg's reduction factor -> the smallest ratio of a crop's shorter side to the target side at which it is used.

At these ratios the pixels differ from bicubic resizing about as much as bilinear resizing does.
"""


def decode(encoded: tf.Tensor, reduction: int = 1) -> tf.Tensor:
    """Returns the RGB picture of JPEG or PNG bytes, (H, W, 3) uint8.

    JPEGs are decoded with libjpeg's accurate transform, which gives the same pixels as Pillow; TensorFlow's default is
    faster but differs by up to six levels. A `reduction` of 2, 4 or 8 divides the sides of a JPEG by that factor,
    rounded up: libjpeg then decodes only the low frequencies of each 8 x 8 block, which is much faster. PNGs ignore it.
    """
    picture = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, ratio=reduction, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_png(encoded, channels=3),
    )
    return tf.ensure_shape(picture, (None, None, 3))


def read_shape(encoded: tf.Tensor) -> tf.Tensor:
    """Returns (height, width) int32 of a JPEG or PNG, read from its header."""
    return tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.extract_jpeg_shape(encoded)[:2],
        lambda: tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)[::-1],
    )


def cut(picture: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Returns the part of a picture that a box touches, at least one pixel.

    Args:
      picture: (H, W, 3).
      box: (4,) left, top, right, bottom as shares of the picture.
    """
    begin, end = pixel_bounds(tf.shape(picture)[:2], box)
    return picture[begin[0] : end[0], begin[1] : end[1]]


def pixel_bounds(shape: tf.Tensor, box: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the first (row, column) that a box touches and the one after the last, both (2,) int32.

    Args:
      shape: (2,) int32, the picture's height and width.
      box: (4,) left, top, right, bottom as shares of the picture.
    """
    extent = tf.cast(shape, tf.float32)
    # Overlaps of up to a thousandth of a pixel are rounding errors, because shares are float32.
    begin = tf.clip_by_value(tf.cast(tf.floor(box[1::-1] * extent + 1e-3), tf.int32), 0, shape - 1)
    return begin, tf.clip_by_value(tf.cast(tf.math.ceil(box[:1:-1] * extent - 1e-3), tf.int32), begin + 1, shape)


def resize(picture: tf.Tensor, size: int, policy: str, filter: str = "bicubic") -> tf.Tensor:
    """Returns the picture as (size, size, 3) uint8, resized with antialiasing.

    Policy "squash" ignores the aspect ratio; "crop" scales the shorter side to `size` and cuts out the centre, as CLIP
    does. The filter is bicubic or bilinear.
    """
    if policy == "squash":
        return tf.ensure_shape(_scale(picture, tf.constant([size, size]), filter), (size, size, 3))
    shape = tf.shape(picture)[:2]
    picture = _scale(picture, size * shape // tf.reduce_min(shape), filter)
    top, left = tf.unstack((tf.shape(picture)[:2] - size) // 2)
    return tf.ensure_shape(picture[top : top + size, left : left + size], (size, size, 3))


def augment(
    encoded: tf.Tensor,
    size: int,
    policy: str,
    augmentation: Augmentation,
    seed: tf.Tensor,
    filter: str = "bicubic",
    *,
    part: tf.Tensor | None = None,
    canvas: int = 0,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a random, possibly mirrored crop of an encoded picture, and its extent.

    If the augmentation keeps the whole picture, it takes the place of the crop. The draws depend only on `seed`. The
    crop's area is drawn uniformly and its aspect ratio log-uniformly. The ratio is relative to the picture's with
    policy "squash", and relative to a square with policy "crop". No side exceeds the picture's. If a crop is drawn,
    large JPEGs are reduced during decoding (REDUCTIONS); whole pictures are not.

    Args:
      encoded: JPEG or PNG bytes.
      size: side of the result without a canvas, in pixels.
      policy: how whole pictures are resized, see `resize`.
      augmentation: ranges of area and aspect ratio, and whether to mirror.
      seed: (2,) seed of the draws.
      filter: "bicubic" or "bilinear".
      part: (4,) left, top, right, bottom as shares of the picture, of which only this part is used; None uses all.
      canvas: 0, or the side, at least `size`, of a black square. The crop is placed in its top left corner at the
        size at which it was decoded, so that the device can scale it (`models.resampling`); crops that do not fit, and
        whole pictures with policy "crop", are scaled here.

    Returns:
      (size, size, 3) uint8, or with a canvas (canvas, canvas, 3) uint8; and (2,) int32, the crop's height and width in
      that array.
    """
    whole = augmentation.keeps_whole_picture
    begin, end, index = _choose_part(encoded, size, policy, augmentation, seed, part)
    picture = tf.switch_case(index, [partial(decode, encoded, reduction) for reduction in REDUCTIONS])
    picture = picture[begin[0] : end[0], begin[1] : end[1]]

    def scale() -> tf.Tensor:
        return resize(picture, size, policy if whole else "squash", filter)

    if canvas and not (whole and policy == "crop"):
        picture = tf.cond(tf.reduce_all(tf.shape(picture) <= canvas), lambda: picture, scale)
    else:
        picture = scale()
    if augmentation.flip:
        picture = tf.image.stateless_random_flip_left_right(picture, seed + 1)
    extent = tf.shape(picture)[:2]
    if not canvas:
        return tf.ensure_shape(picture, (size, size, 3)), extent
    rows = tf.reshape(picture, extent * [1, 3])  # tf.pad is ten times as fast on rows of bytes as on pixels
    rows = tf.pad(rows, [[0, canvas - extent[0]], [0, 3 * (canvas - extent[1])]])
    return tf.reshape(rows, (canvas, canvas, 3)), extent


def decoded_extent(
    encoded: tf.Tensor,
    size: int,
    policy: str,
    augmentation: Augmentation,
    seed: tf.Tensor,
    *,
    part: tf.Tensor | None = None,
) -> tf.Tensor:
    """Returns (height, width) int32 of the crop that `augment` decodes, before it is scaled, without decoding it."""
    begin, end, _ = _choose_part(encoded, size, policy, augmentation, seed, part)
    return end - begin


def _choose_part(
    encoded: tf.Tensor,
    size: int,
    policy: str,
    augmentation: Augmentation,
    seed: tf.Tensor,
    part: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns the part to use of the decoded picture, and the index among REDUCTIONS with which to decode it.

    The part is its first (row, column) and the one after its last, (2,) int32, in pixels of the reduced picture.
    """
    shape = read_shape(encoded)
    begin, end = (tf.zeros_like(shape), shape) if part is None else pixel_bounds(shape, part)
    if augmentation.keeps_whole_picture:
        return begin, end, tf.constant(0)
    begin, end = _draw_crop(begin, end, policy, augmentation, seed)
    reductions, ratios = zip(*REDUCTIONS.items(), strict=True)
    allowed = tf.io.is_jpeg(encoded) & (size * tf.constant(ratios[1:]) <= tf.reduce_min(end - begin))
    index = tf.math.count_nonzero(allowed, dtype=tf.int32)
    reduction = tf.gather(tf.constant(reductions), index)
    return begin // reduction, -(-end // reduction), index


def _draw_crop(
    begin: tf.Tensor, end: tf.Tensor, policy: str, augmentation: Augmentation, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the first (row, column) of a random crop within [begin, end), and the one after its last; (2,) int32."""
    draws = tf.random.stateless_uniform([4], seed)
    shape = tf.cast(end - begin, tf.float32)
    base = shape if policy == "squash" else tf.fill([2], tf.sqrt(shape[0] * shape[1]))
    area = _between(draws[0], *augmentation.crop_area)
    aspect = tf.exp(_between(draws[1], *(math.log(limit) for limit in augmentation.crop_aspect)))
    target = base * tf.sqrt(tf.stack([area / aspect, area * aspect]))  # height, width
    extent = tf.clip_by_value(tf.round(target), 1.0, shape)
    start = begin + tf.cast(tf.floor(draws[2:] * (shape - extent + 1.0)), tf.int32)
    return start, start + tf.cast(extent, tf.int32)


def _between(draw: tf.Tensor, low: float, high: float) -> tf.Tensor:
    return low + (high - low) * draw


def _scale(picture: tf.Tensor, size: tf.Tensor, filter: str) -> tf.Tensor:
    """Returns the picture resized to `size`, (height, width), by Pillow, which is twice as fast as TensorFlow."""

    def scale(pixels: np.ndarray, size: np.ndarray) -> np.ndarray:
        height, width = size.tolist()
        return np.asarray(Image.fromarray(pixels).resize((width, height), FILTERS[filter]))

    scaled = tf.numpy_function(scale, [picture, size], tf.uint8, stateful=False)
    return tf.ensure_shape(scaled, (None, None, 3))
