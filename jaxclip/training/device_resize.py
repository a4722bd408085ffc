"""Training pictures that are scaled on the devices, in a program of its own ahead of the step."""

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

LARGEST, CANVAS = 6, 3
"""Pictures of a catalogue are scaled on the device where none is longer than so many times the towers' size; squares of
so many times that size, at most, hold all but a few of their crops, which are scaled on the host."""
MULTIPLE = 16  # pixels; of a square's side, so that few different programs are compiled


def canvas_of(
    where: str, preprocess: Preprocess, augmentation: Augmentation, largest_side: int, *, prepared: str = ""
) -> int:
    """Returns the side of the squares in which training pictures reach a device that scales them, 0 if the host does.

    Args:
      where: "host", "device", or "auto", which is the device where it is no CPU and none of the errors would be raised.
      preprocess, augmentation: of the run.
      largest_side: of the catalogue's pictures, pixels; 0 where its preparation did not note it.
      prepared: how errors name the catalogue.

    Raises:
      UserError: `where` is "device", and pictures are too large, of unknown size, or cut after they are scaled.
    """
    if where == "host" or (where == "auto" and compiler.on_cpu()):
        return 0
    size, problem = preprocess.image_size, ""
    if preprocess.resize == "crop" and augmentation.keeps_whole_picture:
        problem = "data.resize = 'crop' cuts whole pictures after they are scaled"
    elif not largest_side:
        problem = f"{prepared} was prepared by a version that did not note how large its pictures are: prepare it again"
    elif largest_side > LARGEST * size:
        problem = (
            f"{prepared} has pictures of {largest_side} pixels, more than {LARGEST} times data.image_size = {size}"
        )
    if problem and where == "device":
        raise UserError(f"data.resize_on = 'device': {problem}; or leave it out, and the host scales them")
    return 0 if problem else min(CANVAS * size, max(size, -(-largest_side // MULTIPLE) * MULTIPLE))


def make_device_resize(preprocess: Preprocess, mesh: Mesh, canvas: int) -> Callable[[Batch], Batch]:
    """Returns what makes of a placed batch one of pictures of the towers' size; with no canvas they have it already."""
    if not canvas:
        return lambda batch: batch
    scale = partial(resampling.scale, size=preprocess.image_size, filter=preprocess.filter)
    compiled = jax.jit(scale, out_shardings=batch_sharding(mesh))

    def scaled(batch: Batch) -> Batch:
        others = {name: rows for name, rows in batch.items() if name != "extent"}
        return others | {"image": compiled(batch["image"], batch["extent"])}

    return scaled
