"""InfoNCE and the sigmoid loss with memory linear in the batch size, on one device or many.

Only one tile of the similarity matrix exists at a time on a device. The forward pass of InfoNCE keeps a running maximum
and a running sum for each row and each column (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). The
backward pass recomputes every tile, as FlashAttention (Dao et al. 2022, arXiv:2205.14135) does for attention and Inf-CL
(Cheng et al. 2024, arXiv:2410.17243) does for this loss. For a batch of B pairs and embeddings of D dimensions, value
and gradient need four matrix products of size B x B x D; the dense loss needs three, but it also reads and writes B x B
arrays. The sigmoid loss has no normalising sums, so a single pass with three products computes its value and its
gradient.

On a mesh, each device holds its own rows of images and texts. The blocks of texts, together with their accumulators,
travel once around the ring formed by the mesh's batch axes and return to the device where they started. In addition to
its own rows, a device therefore holds only a visiting block and the next one, which arrives during the computation.
Devices along the other mesh axes repeat the same computation.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxclip.losses.contrastive import Queue
from jaxclip.losses.tiles import Side, Tile, dot, on_mesh, padded, sides, visit_ring, visit_tiles

TILE = 1024
"""Default rows and columns of a tile, which is 4 MiB of float32: small enough for a CPU's cache, yet not too small for
fast matrix products."""

_NONE = -1e30
"""Logit of a masked entry: relative to any real logit its exponential is 0, and unlike -inf it never produces a NaN."""
_BEHIND = 2**30  # `Side.number` of the queue's first row; larger than any row of a batch, so that no entry is a pair
_LANES = 128  # columns of a partial reduction of a row


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    groups: Int[Array, " B"] | None = None,
    queue: Queue | None = None,
    *,
    tile: int = TILE,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the same loss and metrics as `contrastive.info_nce`, up to rounding, computed on the current mesh.

    The number of rows need not be a multiple of the number of devices.

    Args:
      image_embedding, text_embedding, logit_scale, groups: see `contrastive.info_nce`.
      queue: see `contrastive.info_nce`; it is replicated on every device.
      tile: rows and columns of a tile.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    size, scale = len(image_embedding), jnp.asarray(logit_scale, jnp.float32)
    rows = padded(image_embedding, text_embedding, groups)
    value, accuracy = _info_nce(*rows, jax.lax.stop_gradient(queue), scale, size, tile)
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
    """Returns the same loss as `sigmoid.sigmoid`, up to rounding, computed on the current mesh.

    The number of rows need not be a multiple of the number of devices. A tile has `tile` rows and columns.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    size, scale, bias = len(image_embedding), jnp.float32(logit_scale), jnp.float32(logit_bias)
    return _sigmoid(*padded(image_embedding, text_embedding, groups), scale, bias, size, tile)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _info_nce(image, text, groups, queue, scale, size, tile):
    return _info_nce_forward(image, text, groups, queue, scale, size, tile)[0]


def _info_nce_forward(image, text, groups, queue, scale, size, tile):
    run = on_mesh(partial(_log_sums, size=size, tile=tile), split_in=3, split_out=2)
    (row, column), (value, accuracy) = run((image, text, groups), (scale, queue))
    return (value, accuracy), (image, text, groups, queue, scale, row, column)


def _info_nce_backward(size, tile, residuals, cotangents):
    image, text, groups, queue, scale, row, column = residuals
    run = on_mesh(partial(_softmax_gradients, size=size, tile=tile), split_in=5, split_out=2)
    (image_slope, text_slope), scale_slope = run((image, text, groups, row, column), (scale, queue, cotangents[0]))
    return image_slope, text_slope, None, None, scale_slope


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _log_sums(ring, split, whole, *, size, tile):
    """Returns the log-sum-exp of the logits of this device's images and texts, then the batch's (loss, accuracies)."""
    scale, queue = whole
    image, text = sides(ring, *split, size)

    def along_rows(row, logits):
        return _online(row, logits, partial(_along_rows, jnp.max), partial(_along_rows, jnp.sum), 1)

    def visit(at: Tile, rows, column):
        row, positive = rows
        logits = _logits(at, scale)
        found = lax.cond(
            at.near,
            lambda: jnp.max(jnp.where(at.pairs, logits, _NONE), axis=1),
            lambda: jnp.full_like(positive, _NONE),
        )
        column = _online(column, logits, partial(jnp.max, axis=0), partial(jnp.sum, axis=0), 0)
        return (along_rows(row, logits), jnp.maximum(positive, found)), column

    def visit_queue(at: Tile, row, _):
        return along_rows(row, _logits(at, scale)), ()

    empty = jnp.full(len(image.number), _NONE)
    rows, columns = ((empty, jnp.zeros_like(empty)), empty), (empty, jnp.zeros_like(empty))
    (row, positive), column = visit_ring(ring, tile, image, text, rows, columns, visit)
    if queue is not None:
        queued_image, queued_text = _queued(queue)
        row, _ = visit_tiles(tile, image, queued_text, row, (), visit_queue)
        column, _ = visit_tiles(tile, text, queued_image, column, (), visit_queue)
    real = image.number >= 0
    row_log, column_log = (jnp.where(real, top + jnp.log(total), 0.0) for top, total in (row, column))
    means = [
        ring.total(jnp.sum(jnp.where(real, x, 0.0))) / size
        for x in (0.5 * (row_log + column_log) - positive, positive >= row[0], positive >= column[0])
    ]
    return (row_log, column_log), (means[0], tuple(means[1:]))


def _softmax_gradients(ring, split, whole, *, size, tile):
    """Returns the gradients with respect to this device's (images, texts), then that with respect to the scale."""
    image_rows, text_rows, groups, row_log, column_log = split
    scale, queue, cotangent = whole
    image, text = sides(ring, image_rows, text_rows, groups, size)

    def visit(at: Tile, rows, columns):
        (image_slope, row_log), (text_slope, column_log) = rows, columns
        logits = _logits(at, scale)
        slopes = jnp.exp(logits - row_log[:, None]) + jnp.exp(logits - column_log)
        image_more, text_more = _products(at, jnp.where(at.pairs, slopes - 2.0, slopes))
        return (image_slope + image_more, row_log), (text_slope + text_more, column_log)

    def visit_queue(at: Tile, rows, _):
        slope, log = rows
        return (slope + dot(jnp.exp(_logits(at, scale) - log[:, None]), at.right, 1, 0), log), ()

    rows, columns = (jnp.zeros_like(image_rows), row_log), (jnp.zeros_like(text_rows), column_log)
    (image_slope, _), (text_slope, _) = visit_ring(ring, tile, image, text, rows, columns, visit)
    towards_scale = 0.0
    if queue is not None:
        queued_image, queued_text = _queued(queue)
        (image_slope, _), _ = visit_tiles(tile, image, queued_text, (image_slope, row_log), (), visit_queue)
        (more, _), _ = visit_tiles(tile, text, queued_image, (jnp.zeros_like(text_rows), column_log), (), visit_queue)
        text_slope, towards_scale = text_slope + more, jnp.sum(more * text_rows)
    share = 0.5 * cotangent / size
    scale_slope = share * ring.total(jnp.sum(image_slope * image_rows) + towards_scale)
    return (image_slope * (share * scale), text_slope * (share * scale)), scale_slope


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sigmoid(image, text, groups, scale, bias, size, tile):
    return _sigmoid_forward(image, text, groups, scale, bias, size, tile)[0]


def _sigmoid_forward(image, text, groups, scale, bias, size, tile):
    run = on_mesh(partial(_sigmoid_pass, size=size, tile=tile), split_in=3, split_out=2)
    slopes, (value, *scalar_slopes) = run((image, text, groups), (scale, bias))
    return value, (*slopes, *scalar_slopes)


def _sigmoid_backward(size, tile, slopes, cotangent):
    image_slope, text_slope, scale_slope, bias_slope = (cotangent * slope for slope in slopes)
    return image_slope, text_slope, None, scale_slope, bias_slope


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_pass(ring, split, whole, *, size, tile):
    """Returns the gradients for this device's (images, texts), then (loss, gradients for scale and bias) of the batch.

    If only the loss is used, the compiler removes the computation of the gradients.
    """
    scale, bias = whole
    image, text = sides(ring, *split, size)

    def visit(at: Tile, image_slope, columns):
        text_slope, cost, bias_slope = columns
        logits = _logits(at, scale, bias)
        right = at.pairs.astype(jnp.float32)
        slopes = jax.nn.sigmoid(logits) - right
        image_more, text_more = _products(at, slopes)
        cost += jnp.sum(jax.nn.softplus(logits) - right * jnp.where(at.pairs, logits, 0.0), axis=0)
        return image_slope + image_more, (text_slope + text_more, cost, bias_slope + jnp.sum(slopes, axis=0))

    nothing = jnp.zeros(len(text.number))
    columns = (jnp.zeros_like(split[1]), nothing, nothing)
    image_slope, (text_slope, cost, bias_slope) = visit_ring(
        ring, tile, image, text, jnp.zeros_like(split[0]), columns, visit
    )
    sums = (jnp.sum(cost), jnp.sum(image_slope * split[0]), jnp.sum(bias_slope))
    return (image_slope * (scale / size), text_slope * (scale / size)), tuple(ring.total(x) / size for x in sums)


def _logits(at: Tile, scale: Array, bias: Array | float = 0.0) -> Float[Array, "R C"]:
    return jnp.where(at.left_out, _NONE, scale * at.cosines + bias)


def _queued(queue: Queue) -> tuple[Side, Side]:
    """Returns the queue's image side and text side, in float32; slots that are not filled yet count as padding."""
    number = jnp.where(queue.group < 0, -1, _BEHIND + jnp.arange(len(queue.group), dtype=jnp.int32))
    return tuple(Side(side.astype(jnp.float32), queue.group, number) for side in (queue.image, queue.text))


def _online(state, logits, largest, total, axis):
    """Returns the state of an online softmax, (maximum, sum of exponentials relative to it), after more logits."""
    top, summed = state
    new = jnp.maximum(top, largest(logits))
    return new, summed * jnp.exp(top - new) + total(jnp.exp(logits - jnp.expand_dims(new, axis)))


def _along_rows(reduce: Callable, x: Float[Array, "R C"]) -> Float[Array, " R"]:
    """Returns the reduction of each row.

    It reduces blocks of at most _LANES columns elementwise before it reduces across columns, which vectorises better on
    CPUs.
    """
    lanes = math.gcd(x.shape[1], _LANES)
    return reduce(reduce(x.reshape(len(x), -1, lanes), axis=1), axis=1)


def _products(at: Tile, slopes: Float[Array, "R C"]) -> tuple[Float[Array, "R D"], Float[Array, "C D"]]:
    """Returns the gradients with respect to the tile's rows and columns, given those with respect to its cosines."""
    return dot(slopes, at.right, 1, 0), dot(slopes, at.left, 0, 0)
