"""Visits all combinations of two sets of rows, one tile of their similarity matrix at a time."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxclip.losses.labels import Labels, is_alike
from jaxclip.losses.products import dot


class Side(NamedTuple):
    """Some rows (n of them) of one side of the batch, images or texts.

    Attributes:
      embedding: (n, D) unit vectors.
      labels: groups, queries and weights of the rows.
      number: (n,) index of each row in the whole batch; negative for padding.
      log_sum: (n,) log-sum-exp of each row's logits; None in the pass that computes it.
    """

    embedding: Array
    labels: Labels
    number: Array
    log_sum: Array | None = None


class Tile(NamedTuple):
    """One tile of the similarity matrix.

    Attributes:
      left: the tile's rows, R of them.
      right: the tile's columns, C of them.
      cosines: (R, C) similarities of rows and columns.
      pairs: (R, C) True where row and column are a pair, and not padding.
      left_out: (R, C) True where the entry is masked: its row or column is padding, or they are no pair but of one
        group or query.
    """

    left: Side
    right: Side
    cosines: Array
    pairs: Array
    left_out: Array


class Settings(NamedTuple):
    """How a tiled loss is computed.

    Attributes:
      size: number of rows of the batch, without padding.
      tile: rows and columns of a tile.
      exchange: how devices exchange texts; one of `exchange.EXCHANGES`.
      products: precision of matrix products; one of `products.PRODUCTS`.
    """

    size: int
    tile: int
    exchange: str
    products: str


def visit_tiles(settings: Settings, left: Side, right: Side, rows: Any, columns: Any, visit: Callable) -> tuple:
    """Returns (rows, columns) after visiting every combination of a left and a right row, one tile at a time.

    The columns are in the outer loop. The right side may be much longer than the left one, and then each of its rows,
    with its accumulators, is read from main memory and written only once.

    Args:
      settings: size of a tile and precision of the cosines.
      left, right: the rows to combine, n and m of them.
      rows: accumulators (n, ...) of the left rows.
      columns: accumulators (m, ...) of the right rows.
      visit: (a `Tile`, its part of `rows`, its part of `columns`) -> both parts, updated.
    """
    height, width = min(settings.tile, len(left.number)), min(settings.tile, len(right.number))

    def column_of_tiles(j, carry):
        rows, columns = carry
        right_rows = take_slice(right, j, width)

        def one_tile(i, carry):
            rows, column = carry
            at = _tile(take_slice(left, i, height), right_rows, settings.products)
            row, column = visit(at, part(rows, i, height), column)
            return put(rows, row, i, height), column

        rows, column = _loop(-(-len(left.number) // height), one_tile, (rows, part(columns, j, width)))
        return rows, put(columns, column, j, width)

    return _loop(-(-len(right.number) // width), column_of_tiles, (rows, columns))


def _loop(steps: int, step: Callable, carry: Any) -> Any:
    return lax.fori_loop(0, steps, step, carry) if steps > 1 else step(0, carry)


def _tile(left: Side, right: Side, products: str) -> Tile:
    cosines = dot(left.embedding, right.embedding, 1, 1, products)  # (R, C)
    pairs = left.number[:, None] == right.number
    left_out = (left.number < 0)[:, None] | (right.number < 0)
    same = is_alike(left.labels, right.labels)
    if same is not None:
        left_out |= same & ~pairs
    return Tile(left, right, cosines, pairs & ~left_out, left_out)


def take_slice(side: Side, index: Array | int, step: int) -> Side:
    """Returns the slice at position `index` among slices of `step` rows.

    All slices have the same length. If the last one would be shorter, it starts earlier, and the rows that it shares
    with the slice before it are marked as padding.
    """
    taken = part(side, index, step)
    length = len(side.number)
    repeated = jnp.minimum(index * step, length - step) + jnp.arange(step) < index * step
    return taken._replace(number=jnp.where(repeated, -1, taken.number))


def part(tree: Any, index: Array | int, step: int) -> Any:
    """Returns the slice of each array at position `index`; the last one starts earlier if it would be shorter."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * step, step), tree)


def put(tree: Any, parts: Any, index: Array | int, step: int) -> Any:
    """Returns the arrays with the slice that `part` returns replaced by `parts`."""
    return jax.tree.map(lambda x, p: lax.dynamic_update_slice_in_dim(x, p, index * step, 0), tree, parts)
