"""Training pictures that are scaled on the devices, in a program of its own ahead of the step."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from jaxclip.models import compiler, resampling
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.training.mesh import batch_sharding
from jaxclip.training.step import Batch

MULTIPLE = 16


def canvas_of(where: str, size: int, largest_side: int) -> int:
    """Returns the side of the squares in which training pictures reach a device that scales them, 0 if the host does.

    They hold pictures as they are, or reduced while they are decoded. The few whose crop takes more than twice the
    towers' size even so are scaled on the host.

    Args:
      where: `config.data.resize_on`.
      size: of the towers' pictures, pixels.
      largest_side: of the catalogue's, pixels; 0 where that is not known.
    """
    if where == "host" or (where == "auto" and compiler.on_cpu()):
        return 0
    wanted = -(-(largest_side or 2 * size) // MULTIPLE) * MULTIPLE
    return min(2 * size, max(size, wanted))


def make_scaling(preprocess: Preprocess, mesh: Mesh, canvas: int) -> Callable[[Batch], Batch]:
    """Returns what makes of a placed batch one of pictures of the towers' size; with no canvas they have it already."""
    if not canvas:
        return lambda batch: batch
    scale = partial(resampling.scale, size=preprocess.image_size, filter=preprocess.filter)
    compiled = jax.jit(scale, out_shardings=batch_sharding(mesh))

    def scaled(batch: Batch) -> Batch:
        others = {name: rows for name, rows in batch.items() if name != "extent"}
        return others | {"image": compiled(batch["image"], batch["extent"])}

    return scaled
