"""Scales training pictures on the devices, in a separate program that runs before the step."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from jaxclip.config.schema import Augmentation
from jaxclip.errors import UserError
from jaxclip.models import resampling
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.runtime import compiler
from jaxclip.runtime.mesh import batch_sharding
from jaxclip.training.step import Batch

MAX_SIDE_RATIO = 6
"""Devices scale pictures only if no side of the dataset's pictures exceeds this many times the towers' image size."""
MAX_CANVAS_RATIO = 3
"""Largest side of the square that holds an unscaled crop, in image sizes; the host scales crops that do not fit."""
MULTIPLE = 16  # pixels; the longest side is rounded up to a multiple of this, so that few programs are compiled


def canvas_of(
    where: str, preprocess: Preprocess, augmentation: Augmentation, largest_side: int, *, prepared: str = ""
) -> int:
    """Returns the side, in pixels, of the squares that hold unscaled pictures on a device; 0 if the host scales them.

    Args:
      where: "host", "device", or "auto": the device, unless it is a CPU or cannot scale the pictures (see Raises).
      preprocess: preprocessing of the run.
      augmentation: augmentation of the run.
      largest_side: longest side of the dataset's pictures, in pixels; 0 if its preparation did not record it.
      prepared: the dataset's folder, for errors.

    Raises:
      UserError: `where` is "device", but the pictures are too large, of unknown size, or cropped after scaling.
    """
    if where == "host" or (where == "auto" and compiler.on_cpu()):
        return 0
    size, problem = preprocess.image_size, ""
    if preprocess.resize == "crop" and augmentation.keeps_whole_picture:
        problem = "data.resize = 'crop' crops pictures after they are scaled"
    elif not largest_side:
        problem = (
            f"{prepared} was prepared by a version that did not record the size of its pictures: "
            "prepare the dataset again"
        )
    elif largest_side > MAX_SIDE_RATIO * size:
        problem = (
            f"{prepared} has pictures of {largest_side} pixels, more than {MAX_SIDE_RATIO} times data.image_size = "
            f"{size}"
        )
    if problem and where == "device":
        raise UserError(
            f"data.resize_on = 'device': {problem}; leave data.resize_on out, and the host scales the pictures"
        )
    return 0 if problem else min(MAX_CANVAS_RATIO * size, max(size, -(-largest_side // MULTIPLE) * MULTIPLE))


def make_device_resize(preprocess: Preprocess, mesh: Mesh, canvas: int) -> Callable[[Batch], Batch]:
    """Returns a function that scales the pictures of a batch on the devices to the towers' image size.

    The function drops the batch's "extent". If `canvas` is 0 (see `canvas_of`), it returns the batch unchanged.
    """
    if not canvas:
        return lambda batch: batch
    scale = partial(resampling.scale, size=preprocess.image_size, filter=preprocess.filter)
    compiled = jax.jit(scale, out_shardings=batch_sharding(mesh))

    def resize(batch: Batch) -> Batch:
        others = {name: rows for name, rows in batch.items() if name != "extent"}
        return others | {"image": compiled(batch["image"], batch["extent"])}

    return resize
