"""InfoNCE and the sigmoid loss with memory linear in the batch size, on one device or many.

Only one tile of the similarity matrix exists at a time on a device. The forward pass of InfoNCE keeps a running maximum
and a running sum for each row and each column (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867). The
backward pass recomputes every tile, as FlashAttention (Dao et al. 2022, arXiv:2205.14135) does for attention and Inf-CL
(Cheng et al. 2024, arXiv:2410.17243) does for this loss. For a batch of B pairs and embeddings of D dimensions, value
and gradient need four matrix products of size B x B x D; the dense loss needs three, but it also reads and writes B x B
arrays. The sigmoid loss has no normalising sums, so a single pass with three products computes its value and its
gradient.

On a mesh, each device holds its own rows of images and texts, and combines its images with the texts of all devices,
which it receives in blocks or one device's at a time (`exchange`). Devices along the mesh axes that do not split the
batch repeat the same computation.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxclip.losses.contrastive import Queue, QueueWithQueries
from jaxclip.losses.exchange import ONLINE_SOFTMAX, SUMS, Ring, on_mesh, padded, sides, visit_all
from jaxclip.losses.labels import NO_LABELS, Labels, divisor
from jaxclip.losses.products import dot
from jaxclip.losses.tiles import Settings, Side, Tile, visit_tiles
from jaxclip.runtime import compiler

_NONE = -1e30
"""Logit of a masked entry: relative to any real logit its exponential is 0, and unlike -inf it never produces a NaN."""
_BEHIND = 2**30  # `Side.number` of the queue's first row; larger than any row of a batch, so that no entry is a pair


def info_nce(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    labels: Labels = NO_LABELS,
    queue: Queue | QueueWithQueries | None = None,
    *,
    tile: int = 0,
    exchange: str = "gather",
    products: str = "float32",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the same loss and metrics as `contrastive.info_nce`, up to rounding, computed on the current mesh.

    The number of rows need not be a multiple of the number of devices.

    Args:
      image_embedding, text_embedding, logit_scale, labels: see `contrastive.info_nce`.
      queue: see `contrastive.info_nce`; it is replicated on every device.
      tile: rows and columns of a tile; 0 = those of the back end (`compiler.loss_tile`).
      exchange: how devices exchange texts, one of `exchange.EXCHANGES`.
      products: precision of the matrix products, one of `products.PRODUCTS`.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    settings = Settings(len(image_embedding), tile or compiler.loss_tile(), exchange, products)
    rows = padded(image_embedding, text_embedding, labels)
    value, accuracy = _info_nce(*rows, jax.lax.stop_gradient(queue), jnp.asarray(logit_scale, jnp.float32), settings)
    return value, {"image_to_text_accuracy": accuracy[0], "text_to_image_accuracy": accuracy[1]}


def sigmoid(
    image_embedding: Float[Array, "B D"],
    text_embedding: Float[Array, "B D"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""],
    labels: Labels = NO_LABELS,
    *,
    tile: int = 0,
    exchange: str = "gather",
    products: str = "float32",
) -> Float[Array, ""]:
    """Returns the same loss as `sigmoid.sigmoid`, up to rounding, computed on the current mesh.

    The number of rows need not be a multiple of the number of devices. `tile`, `exchange` and `products` are those of
    `info_nce`.

    Raises:
      ValueError: image and text embeddings are not (B, D) arrays of the same shape with B > 0.
    """
    settings = Settings(len(image_embedding), tile or compiler.loss_tile(), exchange, products)
    rows = padded(image_embedding, text_embedding, labels)
    return _sigmoid(*rows, jnp.float32(logit_scale), jnp.float32(logit_bias), settings)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _info_nce(image, text, labels, queue, scale, settings):
    return _info_nce_forward(image, text, labels, queue, scale, settings)[0]


def _info_nce_forward(image, text, labels, queue, scale, settings):
    run = on_mesh(partial(_log_sums, settings=settings), split_in=3, split_out=2)
    (row, column), (value, accuracy) = run((image, text, labels), (scale, queue))
    return (value, accuracy), (image, text, labels, queue, scale, row, column)


def _info_nce_backward(settings, residuals, cotangents):
    image, text, labels, queue, scale, row, column = residuals
    run = on_mesh(partial(_softmax_gradients, settings=settings), split_in=5, split_out=2)
    (image_slope, text_slope), scale_slope = run((image, text, labels, row, column), (scale, queue, cotangents[0]))
    return image_slope, text_slope, None, None, scale_slope


_info_nce.defvjp(_info_nce_forward, _info_nce_backward)


def _log_sums(ring, split, whole, *, settings):
    """Returns the log-sum-exp of the logits of this device's images and texts, then the batch's (loss, accuracies)."""
    scale, queue = whole
    image, text = sides(ring, settings, split)

    def visit(at: Tile, rows, column):
        row, positive = rows
        logits = _logits(at, scale)
        found = jnp.max(jnp.where(at.pairs, logits, _NONE), axis=1)
        return (_online(row, logits, 1), jnp.maximum(positive, found)), _online(column, logits, 0)

    def visit_queue(at: Tile, row, _):
        return _online(row, _logits(at, scale), 1), ()

    empty = jnp.full(len(image.number), _NONE)
    rows, columns = ((empty, jnp.zeros_like(empty)), empty), (empty, jnp.zeros_like(empty))
    (row, positive), column = visit_all(ring, settings, (image, text), rows, columns, visit, ONLINE_SOFTMAX)
    if queue is not None:
        queued_image, queued_text = _queued(queue)
        row, _ = visit_tiles(settings, image, queued_text, row, (), visit_queue)
        column, _ = visit_tiles(settings, text, queued_image, column, (), visit_queue)
    real = image.number >= 0
    row_log, column_log = (jnp.where(real, top + jnp.log(total), 0.0) for top, total in (row, column))
    weight = image.labels.weight
    value, *accuracy = (
        ring.total(jnp.sum(jnp.where(real, x, 0.0)))
        for x in (_weigh(0.5 * (row_log + column_log) - positive, weight), positive >= row[0], positive >= column[0])
    )
    value /= _total_weight(ring, settings, weight)
    return (row_log, column_log), (value, tuple(x / settings.size for x in accuracy))


def _softmax_gradients(ring, split, whole, *, settings):
    """Returns the gradients with respect to this device's (images, texts), then that with respect to the scale."""
    *split, row_log, column_log = split
    scale, queue, cotangent = whole
    image, text = sides(ring, settings, split, (row_log, column_log))

    def visit(at: Tile, image_slope, text_slope):
        logits = _logits(at, scale)
        row_weight, column_weight = _tile_weights(at)
        slopes = _weigh(jnp.exp(logits - at.left.log_sum[:, None]), row_weight)
        slopes += _weigh(jnp.exp(logits - at.right.log_sum), column_weight)
        slopes = jnp.where(at.pairs, slopes - _weigh(2.0, row_weight), slopes)
        image_more, text_more = _products(at, slopes, settings.products)
        return image_slope + image_more, text_slope + text_more

    def visit_queue(at: Tile, slope, _):
        slopes = _weigh(jnp.exp(_logits(at, scale) - at.left.log_sum[:, None]), _tile_weights(at)[0])
        return slope + dot(slopes, at.right.embedding, 1, 0, settings.products), ()

    image_rows, text_rows = split[:2]
    rows, columns = jnp.zeros_like(image_rows), jnp.zeros_like(text_rows)
    image_slope, text_slope = visit_all(ring, settings, (image, text), rows, columns, visit, SUMS)
    towards_scale = 0.0
    if queue is not None:
        queued_image, queued_text = _queued(queue)
        image_slope, _ = visit_tiles(settings, image, queued_text, image_slope, (), visit_queue)
        more, _ = visit_tiles(settings, text, queued_image, columns, (), visit_queue)
        text_slope, towards_scale = text_slope + more, jnp.sum(more * text_rows)
    share = 0.5 * cotangent / _total_weight(ring, settings, image.labels.weight)
    scale_slope = share * ring.total(jnp.sum(image_slope * image_rows) + towards_scale)
    return (image_slope * (share * scale), text_slope * (share * scale)), scale_slope


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sigmoid(image, text, labels, scale, bias, settings):
    return _sigmoid_forward(image, text, labels, scale, bias, settings)[0]


def _sigmoid_forward(image, text, labels, scale, bias, settings):
    run = on_mesh(partial(_sigmoid_pass, settings=settings), split_in=3, split_out=2)
    slopes, (value, *scalar_slopes) = run((image, text, labels), (scale, bias))
    return value, (*slopes, *scalar_slopes)


def _sigmoid_backward(settings, slopes, cotangent):
    image_slope, text_slope, scale_slope, bias_slope = (cotangent * slope for slope in slopes)
    return image_slope, text_slope, None, scale_slope, bias_slope


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_pass(ring, split, whole, *, settings):
    """Returns the gradients for this device's (images, texts), then (loss, gradients for scale and bias) of the batch.

    If only the loss is used, the compiler removes the computation of the gradients.
    """
    scale, bias = whole
    image_rows, text_rows, labels = split
    size = _total_weight(ring, settings, labels.weight)

    def visit(at: Tile, image_slope, columns):
        text_slope, cost, bias_slope = columns
        logits = _logits(at, scale, bias)
        right = at.pairs.astype(jnp.float32)
        row_weight, column_weight = _tile_weights(at)
        weight = None if row_weight is None else 0.5 * (row_weight + column_weight)
        slopes = _weigh(jax.nn.sigmoid(logits) - right, weight)
        image_more, text_more = _products(at, slopes, settings.products)
        costs = jax.nn.softplus(logits) - right * jnp.where(at.pairs, logits, 0.0)
        cost += jnp.sum(_weigh(costs, weight), axis=0)
        return image_slope + image_more, (text_slope + text_more, cost, bias_slope + jnp.sum(slopes, axis=0))

    nothing = jnp.zeros(len(text_rows))
    rows, columns = jnp.zeros_like(image_rows), (jnp.zeros_like(text_rows), nothing, nothing)
    image_slope, columns = visit_all(ring, settings, sides(ring, settings, split), rows, columns, visit, SUMS)
    text_slope, cost, bias_slope = columns
    sums = (jnp.sum(cost), jnp.sum(image_slope * image_rows), jnp.sum(bias_slope))
    return (image_slope * (scale / size), text_slope * (scale / size)), tuple(ring.total(x) / size for x in sums)


def _logits(at: Tile, scale: Array, bias: Array | float = 0.0) -> Float[Array, "R C"]:
    return jnp.where(at.left_out, _NONE, scale * at.cosines + bias)


def _weigh(values: Array | float, weight: Array | None) -> Array | float:
    return values if weight is None else values * weight


def _tile_weights(at: Tile) -> tuple[Array, Array] | tuple[None, None]:
    """Returns the weights of the tile's rows (R, 1) and columns (C,); of the queue's columns there are none."""
    row = at.left.labels.weight
    return (None, None) if row is None else (row[:, None], at.right.labels.weight)


def _total_weight(ring: Ring, settings: Settings, weight: Array | None) -> Array | int:
    """Returns the sum of the weights of the batch, of which this device has its part; its size without weights."""
    return settings.size if weight is None else divisor(ring.total(jnp.sum(weight)))


def _queued(queue: Queue | QueueWithQueries) -> tuple[Side, Side]:
    """Returns the queue's image side and text side, in float32; slots that are not filled yet count as padding."""
    number = jnp.where(queue.group < 0, -1, _BEHIND + jnp.arange(len(queue.group), dtype=jnp.int32))
    labels = Labels(queue.group, queue.query)
    return tuple(Side(side.astype(jnp.float32), labels, number) for side in (queue.image, queue.text))


def _online(state: tuple[Array, Array], logits: Float[Array, "R C"], axis: int) -> tuple[Array, Array]:
    """Returns the state of an online softmax, (maximum, sum of exponentials relative to it), after more logits."""
    top, total = state
    new = jnp.maximum(top, jnp.max(logits, axis=axis))
    return new, total * jnp.exp(top - new) + jnp.sum(jnp.exp(logits - jnp.expand_dims(new, axis)), axis=axis)


def _products(at: Tile, slopes: Float[Array, "R C"], products: str) -> tuple[Float[Array, "R D"], Float[Array, "C D"]]:
    """Returns the gradients with respect to the tile's rows and columns, given those with respect to its cosines."""
    return dot(slopes, at.right.embedding, 1, 0, products), dot(slopes, at.left.embedding, 0, 0, products)
