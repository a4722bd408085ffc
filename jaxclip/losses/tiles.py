"""Visits all combinations of images and texts tile by tile, on one device or around the ring of a mesh's batch axes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxclip.runtime.mesh import BATCH_AXES


class Side(NamedTuple):
    """Some rows (n of them) of one side of the batch, images or texts.

    Attributes:
      embedding: (n, D) unit vectors.
      group: (n,) group of each row; None if groups are not used.
      number: (n,) index of each row in the whole batch; negative for padding.
    """

    embedding: Array
    group: Array | None
    number: Array


class Tile(NamedTuple):
    """One tile of the similarity matrix.

    Attributes:
      left: embeddings of the tile's rows.
      right: embeddings of the tile's columns.
      cosines: similarities of rows and columns.
      pairs: True where row and column are a pair, and not padding.
      left_out: True where the entry is masked: its row or column is padding, or they are no pair but of one group.
      near: False if the tile certainly contains no pair, so that the search for pairs can be skipped.
    """

    left: Array  # (R, D)
    right: Array  # (C, D)
    cosines: Array  # (R, C)
    pairs: Array  # (R, C) bool
    left_out: Array  # (R, C) bool
    near: Array  # () bool


class Ring(NamedTuple):
    """The devices that the rows of a batch are split over, in a ring.

    Attributes:
      axes: mesh axes of the ring.
      size: number of devices in the ring.
    """

    axes: tuple[str, ...]
    size: int

    def place(self) -> Array | int:
        """Returns this device's position in the ring."""
        return lax.axis_index(self.axes) if self.size > 1 else 0

    def total(self, x: Array) -> Array:
        """Returns the sum of x over the devices of the ring."""
        return lax.psum(x, self.axes) if self.size > 1 else x

    def pass_on(self, tree: Any) -> Any:
        """Sends the arrays to the next device and returns those of the previous one."""
        return lax.ppermute(tree, self.axes, [(i, (i + 1) % self.size) for i in range(self.size)])


def visit_ring(ring: Ring, tile: int, image: Side, text: Side, rows: Any, columns: Any, visit: Callable) -> tuple:
    """Visits every tile of this device's images and all texts of the batch; returns the updated (rows, columns).

    The texts and their accumulators travel around the ring, so each text is also combined with all images.

    Args:
      ring: the devices.
      tile: rows and columns of a tile.
      image, text: this device's n images and n texts.
      rows: accumulators (n, ...) of this device's images; they stay on the device.
      columns: accumulators (n, ...) of this device's texts; they travel around the ring with the texts.
      visit: (a `Tile`, its part of `rows`, its part of `columns`) -> both parts, updated.
    """
    if ring.size == 1:
        return visit_tiles(tile, image, text, rows, columns, visit)

    def step(_, carry):
        rows, text, columns = carry
        following = ring.pass_on(text)  # before `visit_tiles`, so that sending overlaps with the computation
        rows, columns = visit_tiles(tile, image, text, rows, columns, visit)
        return rows, following, ring.pass_on(columns)

    rows, _, columns = lax.fori_loop(0, ring.size, step, (rows, text, columns))
    return rows, columns


def visit_tiles(tile: int, left: Side, right: Side, rows: Any, columns: Any, visit: Callable) -> tuple:
    """Returns (rows, columns) after visiting every combination of a left and a right row, one tile at a time.

    The arguments are those of `visit_ring`, with `left` for the images and `right` for the texts, but only rows on this
    device are visited.
    """
    height, width = min(tile, len(left.number)), min(tile, len(right.number))

    def row_of_tiles(i, carry):
        rows, columns = carry
        left_rows = _slice(left, i, height)

        def one_tile(j, carry):
            row, columns = carry
            row, column = visit(_tile(left_rows, _slice(right, j, width)), row, _part(columns, j, width))
            return row, _put(columns, column, j, width)

        steps = -(-len(right.number) // width)
        row, columns = lax.fori_loop(0, steps, one_tile, (_part(rows, i, height), columns))
        return _put(rows, row, i, height), columns

    return lax.fori_loop(0, -(-len(left.number) // height), row_of_tiles, (rows, columns))


def _tile(left: Side, right: Side) -> Tile:
    cosines = dot(left.embedding, right.embedding, 1, 1)  # (R, C)
    pairs = left.number[:, None] == right.number
    left_out = (left.number < 0)[:, None] | (right.number < 0)
    if left.group is not None:
        left_out |= (left.group[:, None] == right.group) & ~pairs
    distance = jnp.abs(left.number.max() - right.number.max())
    near = distance < max(len(left.number), len(right.number))
    return Tile(left.embedding, right.embedding, cosines, pairs & ~left_out, left_out, near)


def _slice(side: Side, index: Array, step: int) -> Side:
    """Returns the slice at position `index` among slices of `step` rows.

    All slices have the same length. If the last one would be shorter, it starts earlier, and the rows that it shares
    with the slice before it are marked as padding.
    """
    part = _part(side, index, step)
    length = len(side.number)
    repeated = jnp.minimum(index * step, length - step) + jnp.arange(step) < index * step
    return part._replace(number=jnp.where(repeated, -1, part.number))


def _part(tree: Any, index: Array, step: int) -> Any:
    """Returns the slice of each array at position `index`; the last one starts earlier if it would be shorter."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * step, step), tree)


def _put(tree: Any, part: Any, index: Array, step: int) -> Any:
    """Returns the arrays with the slice that `_part` returns replaced by `part`."""
    return jax.tree.map(lambda x, p: lax.dynamic_update_slice_in_dim(x, p, index * step, 0), tree, part)


def dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Returns the float32 product of two matrices, contracted over `axis_a` of a and `axis_b` of b."""
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _ring() -> Ring:
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
    ring = _ring()
    if jax.sharding.get_abstract_mesh().size <= 1:
        return partial(run, ring)
    rows, everywhere = PartitionSpec(BATCH_AXES), PartitionSpec()
    return jax.shard_map(
        partial(run, ring),
        in_specs=((rows,) * split_in, everywhere),
        out_specs=((rows,) * split_out, everywhere),
        check_vma=False,
    )


def sides(ring, image, text, groups, size):
    """Returns this device's rows as (image side, text side); from row `size` of the batch on, rows are padding (-1)."""
    place = ring.place() * len(image) + jnp.arange(len(image), dtype=jnp.int32)
    number = jnp.where(place < size, place, -1)
    return Side(image, groups, number), Side(text, groups, number)


def padded(image, text, groups):
    """Returns (image, text, groups), padded to a multiple of the ring's number of devices; embeddings are float32.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    if image.shape != text.shape or image.ndim != 2 or not len(image):
        raise ValueError(f"image and text embeddings (B, D) of one shape expected, got {image.shape}, {text.shape}")
    more = -len(image) % _ring().size
    image, text = (jnp.pad(jnp.asarray(x, jnp.float32), ((0, more), (0, 0))) for x in (image, text))
    return image, text, None if groups is None else jnp.pad(jnp.asarray(groups), (0, more))
