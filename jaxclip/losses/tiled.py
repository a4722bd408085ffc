"""InfoNCE and the sigmoid loss whose memory grows with the batch, never with its square; on one device or many.

Similarities exist one tile at a time. The forward pass of InfoNCE keeps a running maximum and a running sum for each
row and each column (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867); the backward pass computes every
tile once more, as FlashAttention does (Dao et al. 2022, arXiv:2205.14135) and Inf-CL (Cheng et al. 2024,
arXiv:2410.17243) for this loss. Four products of B x B x D are the least that this takes, where the dense loss pays
for three and for the traffic of its B x B arrays. The sigmoid loss needs no sums first: value and gradient come from
one pass and three products.

On a mesh each device holds its rows of both sides. Blocks of texts, with all that belongs to them, travel once around
the ring of the mesh's batch axes and are home again at its end: a device never holds more than its own rows and one
visiting block. Devices along other axes all compute the same.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

BATCH_AXES = ("data", "fsdp")
"""The axes of `training.mesh` that split a batch."""
TILE = 1024
"""Rows and columns of a tile: its 4 MiB stay in the cache, and products are long enough to run at full speed."""

_NONE = -1e30
"""The logit of what does not count: its exponential is zero beside any that does, and no infinity meets another."""
_LANES = 128


class _Side(NamedTuple):
    """Rows of one side of the batch: embedding (b, D), group (b,) or None, and number (b,), negative for padding."""

    embedding: Array
    group: Array | None
    number: Array


class _Tile(NamedTuple):
    """Cosines of some images and some texts, where they are pairs, and where they do not count."""

    image: Array  # (R, D)
    text: Array  # (C, D)
    cosines: Array  # (R, C)
    pairs: Array  # (R, C) bool
    left_out: Array  # (R, C) bool
    near: Array  # () bool, False only where no entry is a pair


class _Ring(NamedTuple):
    """The devices that the rows of a batch are split over."""

    axes: tuple[str, ...]
    size: int

    def place(self) -> Array | int:
        return lax.axis_index(self.axes) if self.size > 1 else 0

    def total(self, x: Array) -> Array:
        return lax.psum(x, self.axes) if self.size > 1 else x

    def pass_on(self, tree: Any) -> Any:
        return lax.ppermute(tree, self.axes, [(i, (i + 1) % self.size) for i in range(self.size)])


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
    *,
    tile: int = TILE,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns what `contrastive.info_nce` returns, for any number of rows on whatever mesh is set."""
    size, scale = len(image_embedding), jnp.asarray(logit_scale, jnp.float32)
    value, accuracy = _info_nce(*_padded(image_embedding, text_embedding, groups), scale, size, tile)
    return value, {"image_to_text_accuracy": accuracy[0], "text_to_image_accuracy": accuracy[1]}


def sigmoid(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
    *,
    tile: int = TILE,
) -> Float[Array, ""]:
    """Returns what `sigmoid.sigmoid` returns, for any number of rows on whatever mesh is set."""
    size, scale, bias = len(image_embedding), jnp.float32(logit_scale), jnp.float32(logit_bias)
    return _sigmoid(*_padded(image_embedding, text_embedding, groups), scale, bias, size, tile)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _info_nce(image, text, groups, scale, size, tile):
    return _info_nce_forward(image, text, groups, scale, size, tile)[0]


def _info_nce_forward(image, text, groups, scale, size, tile):
    run = _on_mesh(partial(_log_sums, size=size, tile=tile), split_in=3, split_out=2)
    (row, column), (value, accuracy) = run((image, text, groups), scale)
    return (value, accuracy), (image, text, groups, scale, row, column)


def _info_nce_backward(size, tile, residuals, cotangents):
    image, text, groups, scale, row, column = residuals
    run = _on_mesh(partial(_softmax_gradients, size=size, tile=tile), split_in=5, split_out=2)
    (image_slope, text_slope), scale_slope = run((image, text, groups, row, column), (scale, cotangents[0]))
    return image_slope, text_slope, None, scale_slope


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _log_sums(ring, split, scale, *, size, tile):
    """Returns each image's and each text's log-sum-exp of logits; value and accuracies of the whole batch."""
    image, text = _sides(ring, *split, size)

    def visit(at: _Tile, rows, columns):
        row, positive = rows
        logits = jnp.where(at.left_out, _NONE, scale * at.cosines)
        found = lax.cond(
            at.near,
            lambda: jnp.max(jnp.where(at.pairs, logits, _NONE), axis=1),
            lambda: jnp.full_like(positive, _NONE),
        )
        row = _online(row, logits, partial(_along_rows, jnp.max), partial(_along_rows, jnp.sum), 1)
        column = _online(columns, logits, partial(jnp.max, axis=0), partial(jnp.sum, axis=0), 0)
        return (row, jnp.maximum(positive, found)), column

    empty = jnp.full(len(image.number), _NONE)
    rows, columns = ((empty, jnp.zeros_like(empty)), empty), (empty, jnp.zeros_like(empty))
    (row, positive), column = _walk(ring, tile, image, text, rows, columns, visit)
    real = image.number >= 0
    row_log, column_log = (jnp.where(real, top + jnp.log(total), 0.0) for top, total in (row, column))
    means = [
        ring.total(jnp.sum(jnp.where(real, x, 0.0))) / size
        for x in (0.5 * (row_log + column_log) - positive, positive >= row[0], positive >= column[0])
    ]
    return (row_log, column_log), (means[0], tuple(means[1:]))


def _softmax_gradients(ring, split, whole, *, size, tile):
    """Returns the gradients by images and texts, and by the scale."""
    image_rows, text_rows, groups, row_log, column_log = split
    scale, cotangent = whole
    image, text = _sides(ring, image_rows, text_rows, groups, size)

    def visit(at: _Tile, rows, columns):
        (image_slope, row_log), (text_slope, column_log) = rows, columns
        logits = jnp.where(at.left_out, _NONE, scale * at.cosines)
        slopes = jnp.exp(logits - row_log[:, None]) + jnp.exp(logits - column_log)
        image_more, text_more = _products(at, jnp.where(at.pairs, slopes - 2.0, slopes))
        return (image_slope + image_more, row_log), (text_slope + text_more, column_log)

    rows, columns = (jnp.zeros_like(image_rows), row_log), (jnp.zeros_like(text_rows), column_log)
    (image_slope, _), (text_slope, _) = _walk(ring, tile, image, text, rows, columns, visit)
    share = 0.5 * cotangent / size
    scale_slope = share * ring.total(jnp.sum(image_slope * image_rows))
    return (image_slope * (share * scale), text_slope * (share * scale)), scale_slope


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sigmoid(image, text, groups, scale, bias, size, tile):
    return _sigmoid_forward(image, text, groups, scale, bias, size, tile)[0]


def _sigmoid_forward(image, text, groups, scale, bias, size, tile):
    run = _on_mesh(partial(_sigmoid_pass, size=size, tile=tile), split_in=3, split_out=2)
    slopes, (value, *scalar_slopes) = run((image, text, groups), (scale, bias))
    return value, (*slopes, *scalar_slopes)


def _sigmoid_backward(size, tile, slopes, cotangent):
    image_slope, text_slope, scale_slope, bias_slope = (cotangent * slope for slope in slopes)
    return image_slope, text_slope, None, scale_slope, bias_slope


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_pass(ring, split, whole, *, size, tile):
    """Returns the gradients by images and texts; the value and its gradients by scale and bias.

    A caller that wants the value alone pays for it alone: the compiler drops what is not used.
    """
    scale, bias = whole
    image, text = _sides(ring, *split, size)

    def visit(at: _Tile, image_slope, columns):
        text_slope, cost, bias_slope = columns
        logits = jnp.where(at.left_out, _NONE, scale * at.cosines + bias)
        right = at.pairs.astype(jnp.float32)
        slopes = jax.nn.sigmoid(logits) - right
        image_more, text_more = _products(at, slopes)
        cost += jnp.sum(jax.nn.softplus(logits) - right * jnp.where(at.pairs, logits, 0.0), axis=0)
        return image_slope + image_more, (text_slope + text_more, cost, bias_slope + jnp.sum(slopes, axis=0))

    nothing = jnp.zeros(len(text.number))
    columns = (jnp.zeros_like(split[1]), nothing, nothing)
    image_slope, (text_slope, cost, bias_slope) = _walk(
        ring, tile, image, text, jnp.zeros_like(split[0]), columns, visit
    )
    sums = (jnp.sum(cost), jnp.sum(image_slope * split[0]), jnp.sum(bias_slope))
    return (image_slope * (scale / size), text_slope * (scale / size)), tuple(ring.total(x) / size for x in sums)


def _walk(ring: _Ring, tile: int, image: _Side, text: _Side, rows: Any, columns: Any, visit: Callable) -> tuple:
    """Returns (rows, columns) after every image has met every text of the whole batch, a tile at a time.

    Args:
      rows: arrays (b, ...) that belong to this device's images and stay.
      columns: arrays (b, ...) that belong to its texts and travel with them.
      visit: (tile, its part of rows, its part of columns) -> the same parts after it.
    """
    length = len(image.number)
    step = min(tile, length)
    count = -(-length // step)

    def block(rows, text, columns):
        def row_of_tiles(i, carry):
            rows, columns = carry
            some_images = _slice(image, i, step)

            def one_tile(j, carry):
                row, columns = carry
                at = _tile(some_images, _slice(text, j, step))
                row, column = visit(at, row, _part(columns, j, step))
                return row, _put(columns, column, j, step)

            row, columns = lax.fori_loop(0, count, one_tile, (_part(rows, i, step), columns))
            return _put(rows, row, i, step), columns

        return lax.fori_loop(0, count, row_of_tiles, (rows, columns))

    if ring.size == 1:
        return block(rows, text, columns)

    def stop(_, carry):
        rows, text, columns = carry
        following = ring.pass_on(text)  # on its way while this block is worked on
        rows, columns = block(rows, text, columns)
        return rows, following, ring.pass_on(columns)

    rows, _, columns = lax.fori_loop(0, ring.size, stop, (rows, text, columns))
    return rows, columns


def _tile(image: _Side, text: _Side) -> _Tile:
    cosines = _dot(image.embedding, text.embedding, 1, 1)  # (R, C)
    pairs = image.number[:, None] == text.number
    left_out = (image.number < 0)[:, None] | (text.number < 0)
    if image.group is not None:
        left_out |= (image.group[:, None] == text.group) & ~pairs
    first, last = image.number.max(), text.number.max()
    near = jnp.abs(first - last) < len(image.number)
    return _Tile(image.embedding, text.embedding, cosines, pairs & ~left_out, left_out, near)


def _slice(side: _Side, index: Array, step: int) -> _Side:
    """Returns the index-th part; the last one begins earlier where it would be shorter, what it repeats is padding."""
    part = _part(side, index, step)
    length = len(side.number)
    repeated = jnp.minimum(index * step, length - step) + jnp.arange(step) < index * step
    return part._replace(number=jnp.where(repeated, -1, part.number))


def _part(tree: Any, index: Array, step: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * step, step), tree)


def _put(tree: Any, part: Any, index: Array, step: int) -> Any:
    return jax.tree.map(lambda x, p: lax.dynamic_update_slice_in_dim(x, p, index * step, 0), tree, part)


def _online(state, logits, largest, total, axis):
    """Returns (maximum, sum of exponentials relative to it) after some more logits."""
    top, summed = state
    new = jnp.maximum(top, largest(logits))
    return new, summed * jnp.exp(top - new) + total(jnp.exp(logits - jnp.expand_dims(new, axis)))


def _along_rows(reduce: Callable, x: Float[Array, "R C"]) -> Float[Array, " R"]:
    """Returns the reduction of each row in two stages, of which the first is across rows of vectors: faster on CPU."""
    lanes = math.gcd(x.shape[1], _LANES)
    return reduce(reduce(x.reshape(len(x), -1, lanes), axis=1), axis=1)


def _products(at: _Tile, slopes: Float[Array, "R C"]) -> tuple[Float[Array, "R D"], Float[Array, "C D"]]:
    return _dot(slopes, at.text, 1, 0), _dot(slopes, at.image, 0, 0)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _ring() -> _Ring:
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return _Ring(BATCH_AXES, 1)
    return _Ring(BATCH_AXES, math.prod(mesh.shape[axis] for axis in BATCH_AXES))


def _on_mesh(run: Callable, *, split_in: int, split_out: int) -> Callable:
    """Returns run(ring, arrays split by rows, whole values) as a function of whole arrays on the mesh that is set."""
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


def _sides(ring, image, text, groups, size):
    """Returns both sides of this device's rows, padding told by its number."""
    place = ring.place() * len(image) + jnp.arange(len(image), dtype=jnp.int32)
    number = jnp.where(place < size, place, -1)
    return _Side(image, groups, number), _Side(text, groups, number)


def _padded(image, text, groups):
    """Returns float32 rows, as many as the ring's devices divide."""
    if image.shape != text.shape or image.ndim != 2 or not len(image):
        raise ValueError(f"image and text embeddings (B, D) of one shape expected, got {image.shape}, {text.shape}")
    more = -len(image) % _ring().size
    image, text = (jnp.pad(jnp.asarray(x, jnp.float32), ((0, more), (0, 0))) for x in (image, text))
    return image, text, None if groups is None else jnp.pad(jnp.asarray(groups), (0, more))
