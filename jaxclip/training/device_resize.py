"""Scales training pictures on the devices, in a separate program that runs before the step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh

from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.models import resampling
from jaxclip.pipeline import images
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import batch_sharding
from jaxclip.runtime.tensorflow import tf
from jaxclip.training.step import Batch

MAX_CANVAS_RATIO = 3
"""Largest side of the square that holds an unscaled crop, in image sizes; the host scales crops that do not fit."""
MULTIPLE = 16  # pixels; sides are rounded up to a multiple of this within limits, so that few programs are compiled
SHARE, LEAST_SHARE = 0.95, 0.5
"""Shares of the training crops: those that the square shall hold, and those that it must hold to be of use."""
SAMPLE = 512  # records whose crops are measured


@dataclass(frozen=True)
class Canvas:
    """Where training pictures are scaled.

    Attributes:
      side: side, in pixels, of the squares in which devices receive unscaled pictures; 0 = the host scales all.
      line: what to say about it; "" if the configuration says it.
    """

    side: int
    line: str = ""


def choose_canvas(where: str, records: Records, preprocess: Preprocess, augmentation: Augmentation) -> Canvas:
    """Returns where training pictures are scaled, from the sizes of the crops of the first SAMPLE records.

    The square holds at least SHARE of the crops, if its side is not more than MAX_CANVAS_RATIO image sizes. The host
    scales each crop that it does not hold; the result has exactly the pixels that it has if the host scales all.

    Args:
      where: "host", "device", or "auto": the device, unless it is a CPU, pictures are cropped after they are scaled
        (data.resize = "crop" without random crops), or the largest square holds less than LEAST_SHARE of the crops.
      records: training records.
      preprocess: preprocessing of the run.
      augmentation: augmentation of the run.

    Raises:
      UserError: `where` is "device", but pictures are cropped after they are scaled.
    """
    if where == "host" or (where == "auto" and compiler.on_cpu()):
        return Canvas(0)
    if preprocess.resize == "crop" and augmentation.keeps_whole_picture:
        problem = "data.resize = 'crop' crops pictures after they are scaled"
        if where == "device":
            raise UserError(
                f"data.resize_on = 'device': {problem}; leave data.resize_on out, and the host scales the pictures"
            )
        return Canvas(0, f"training pictures are scaled on the host: {problem}")
    size = preprocess.image_size
    sides = _longest_sides(records, preprocess, augmentation)
    wanted = int(np.quantile(sides, SHARE, method="higher"))
    side = min(MAX_CANVAS_RATIO * size, max(size, -(-wanted // MULTIPLE) * MULTIPLE))
    fitting = float((sides <= side).mean())
    if where == "auto" and fitting < LEAST_SHARE:
        line = f"training pictures are scaled on the host: {1 - fitting:.0%} of them are larger than {side} pixels"
        return Canvas(0, line)
    line = f"training pictures are scaled on the device, where they arrive in squares of {side} pixels"
    if fitting < 1:
        line += f"; the host scales the {1 - fitting:.1%} of them that are larger"
    return Canvas(side, line)


def _longest_sides(records: Records, preprocess: Preprocess, augmentation: Augmentation) -> np.ndarray:
    """Returns the longer side of one random crop of each of the first SAMPLE records, as it is decoded, in pixels."""

    def longest_side(position: tf.Tensor, serialized: tf.Tensor) -> tf.Tensor:
        encoded, part = records.picture(records.parse(serialized), 0)
        part = part if preprocess.picture == "crop" else None
        seed = tf.stack([tf.zeros_like(position), position])
        size, policy = preprocess.image_size, preprocess.resize
        extent = images.decoded_extent(encoded, size, policy, augmentation, seed, part=part)
        return tf.reduce_max(extent)

    serialized = records.read(np.arange(min(SAMPLE, len(records))))
    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(serialized)), serialized.tolist()))
    dataset = dataset.map(tf.autograph.experimental.do_not_convert(longest_side), num_parallel_calls=tf.data.AUTOTUNE)
    return np.asarray(list(dataset.as_numpy_iterator()))


def make_device_resize(preprocess: Preprocess, mesh: Mesh, canvas: int) -> Callable[[Batch], Batch]:
    """Returns a function that scales the pictures of a batch on the devices to the towers' image size.

    The function drops the batch's "extent". If `canvas` is 0 (see `choose_canvas`), it returns the batch unchanged.
    """
    if not canvas:
        return lambda batch: batch
    scale = partial(resampling.scale, size=preprocess.image_size, filter=preprocess.filter)
    compiled = jax.jit(scale, out_shardings=batch_sharding(mesh))

    def resize(batch: Batch) -> Batch:
        others = {name: rows for name, rows in batch.items() if name != "extent"}
        return others | {"image": compiled(batch["image"], batch["extent"])}

    return resize
