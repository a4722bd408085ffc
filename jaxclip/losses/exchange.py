"""Combines the images of each device with the texts of all devices of the mesh's batch axes.

"gather" collects the texts of all devices, BLOCK at a time, and sums what each device has accumulated for them. Its
collectives use all links of a device, and each device sends its share to other slices or machines. "ring" passes the
texts of each device to the next device, over one link, with what has been accumulated for them. A device holds nothing
but a visiting block and the next one.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxclip.losses.labels import Labels
from jaxclip.losses.tiles import Settings, Side, part, put, take_slice, visit_tiles
from jaxclip.runtime.mesh import BATCH_AXES

EXCHANGES = ("gather", "ring")
"""Values of config.loss.exchange."""
BLOCK = 2**17
"""Largest number of texts of all devices that "gather" collects at a time: 256 MiB of float32 at 512 dimensions."""


class Ring(NamedTuple):
    """The devices that the rows of a batch are split over, in the order of their rows.

    Attributes:
      axes: mesh axes of the devices.
      size: number of devices.
    """

    axes: tuple[str, ...]
    size: int

    def place(self) -> Array | int:
        """Returns this device's position."""
        return lax.axis_index(self.axes) if self.size > 1 else 0

    def total(self, x: Array) -> Array:
        """Returns the sum of x over the devices."""
        return lax.psum(x, self.axes) if self.size > 1 else x

    def pass_on(self, tree: Any) -> Any:
        """Sends the arrays to the next device and returns those of the previous one."""
        return lax.ppermute(tree, self.axes, [(i, (i + 1) % self.size) for i in range(self.size)])

    def gather(self, tree: Any) -> Any:
        """Returns the rows of all devices."""
        return jax.tree.map(lambda x: lax.all_gather(x, self.axes, tiled=True), tree)

    def scatter(self, x: Array) -> Array:
        """Returns this device's rows of the sum of x, which holds the rows of all devices, over the devices."""
        return lax.psum_scatter(x, self.axes, tiled=True)


class Accumulators(NamedTuple):
    """How accumulators of texts on several devices become one.

    Attributes:
      merge: (accumulators, more of the same texts) -> those of both.
      collect: (devices, this device's accumulators for the texts of all devices) -> those of this device's texts.
    """

    merge: Callable[[Any, Any], Any]
    collect: Callable[[Ring, Any], Any]


def _merge_sums(some: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, some, more)


def _collect_sums(ring: Ring, sums: Any) -> Any:
    return jax.tree.map(ring.scatter, sums)


def _merge_softmax(some: tuple[Array, Array], more: tuple[Array, Array]) -> tuple[Array, Array]:
    top = jnp.maximum(some[0], more[0])
    return top, some[1] * jnp.exp(some[0] - top) + more[1] * jnp.exp(more[0] - top)


def _collect_softmax(ring: Ring, state: tuple[Array, Array]) -> tuple[Array, Array]:
    top = lax.pmax(state[0], ring.axes)
    total = ring.scatter(state[1] * jnp.exp(state[0] - top))
    return lax.dynamic_slice_in_dim(top, ring.place() * len(total), len(total)), total


SUMS = Accumulators(_merge_sums, _collect_sums)
"""Arrays that are summed."""
ONLINE_SOFTMAX = Accumulators(_merge_softmax, _collect_softmax)
"""A maximum, and a sum of exponentials relative to it."""


def visit_all(
    ring: Ring,
    settings: Settings,
    sides: tuple[Side, Side],
    rows: Any,
    columns: Any,
    visit: Callable,
    kind: Accumulators,
) -> tuple:
    """Visits every tile of this device's images and all texts of the batch; returns the updated (rows, columns).

    Args:
      ring: the devices.
      settings: how to exchange texts, and the size of a tile.
      sides: this device's n images and n texts.
      rows: accumulators (n, ...) of this device's images.
      columns: empty accumulators (n, ...) of this device's texts.
      visit: (a `Tile`, its part of `rows`, its part of `columns`) -> both parts, updated.
      kind: how accumulators of columns are merged: SUMS or ONLINE_SOFTMAX.
    """
    image, text = sides
    if ring.size == 1:
        return visit_tiles(settings, image, text, rows, columns, visit)
    exchange = {"gather": _gather, "ring": _ring}[settings.exchange]
    return exchange(ring, settings, image, text, rows, columns, visit, kind)


def _gather(ring, settings, image, text, rows, columns, visit, kind):
    blocks = math.ceil(len(text.number) * ring.size / BLOCK)
    step = math.ceil(len(text.number) / blocks)  # texts of one device in a block
    empty = jax.tree.map(lambda x: jnp.repeat(x[:1], step * ring.size, axis=0), columns)

    def one_block(i, carry):
        rows, columns = carry
        block = ring.gather(take_slice(text, i, step))
        rows, found = visit_tiles(settings, image, block, rows, empty, visit)
        return rows, put(columns, kind.merge(part(columns, i, step), kind.collect(ring, found)), i, step)

    return lax.fori_loop(0, blocks, one_block, (rows, columns)) if blocks > 1 else one_block(0, (rows, columns))


def _ring(ring, settings, image, text, rows, columns, visit, kind):
    def step(_, carry):
        rows, text, sums = carry
        # Both are sent before the computation, which overlaps with them: the accumulators are those of the block that
        # this device had in the step before, and go to where that block is now.
        following, arrived = ring.pass_on(text), ring.pass_on(sums)
        rows, found = visit_tiles(settings, image, text, rows, columns, visit)
        return rows, following, kind.merge(arrived, found)

    rows, _, sums = lax.fori_loop(0, ring.size, step, (rows, text, columns))
    return rows, ring.pass_on(sums)


def _devices() -> Ring:
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return Ring(BATCH_AXES, 1)
    return Ring(BATCH_AXES, math.prod(mesh.shape[axis] for axis in BATCH_AXES))


def on_mesh(run: Callable, *, split_in: int, split_out: int) -> Callable:
    """Returns a function (row-sharded arrays, replicated values) that calls `run` on each device of the current mesh.

    Its arguments and results are global arrays.

    Args:
      run: (ring, this device's rows of the sharded arrays, replicated values) -> (sharded results, replicated results).
      split_in: number of row-sharded arguments.
      split_out: number of row-sharded results.
    """
    ring = _devices()
    if jax.sharding.get_abstract_mesh().size <= 1:
        return partial(run, ring)
    rows, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        partial(run, ring),
        in_specs=((rows,) * split_in, everywhere),
        out_specs=((rows,) * split_out, everywhere),
        check_vma=False,
    )


def sides(
    ring: Ring, settings: Settings, rows: tuple[Array, Array, Labels], log_sums: tuple = (None, None)
) -> tuple[Side, Side]:
    """Returns this device's rows as (image side, text side); beyond the batch's size, rows are padding (number -1).

    Embeddings have the type in which they are multiplied, so that no more bytes are sent than are used.

    Args:
      ring: the devices.
      settings: size of the batch and precision of the products.
      rows: this device's (image embeddings, text embeddings, labels).
      log_sums: `Side.log_sum` of both sides.
    """
    image, text, labels = rows
    place = ring.place() * len(image) + jnp.arange(len(image), dtype=jnp.int32)
    number = jnp.where(place < settings.size, place, -1)
    dtype = jnp.bfloat16 if settings.products == "bfloat16" else jnp.float32
    return tuple(
        Side(x.astype(dtype), labels, number, log_sum) for x, log_sum in zip((image, text), log_sums, strict=True)
    )


def padded(image, text, labels: Labels):
    """Returns (image, text, labels), padded to a multiple of the number of devices; embeddings are float32.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    if image.shape != text.shape or image.ndim != 2 or not len(image):
        raise ValueError(f"image and text embeddings (B, D) of one shape expected, got {image.shape}, {text.shape}")
    more = -len(image) % _devices().size
    image, text = (jnp.pad(jnp.asarray(x, jnp.float32), ((0, more), (0, 0))) for x in (image, text))
    return image, text, jax.tree.map(lambda x: jnp.pad(jnp.asarray(x), (0, more)), labels)
