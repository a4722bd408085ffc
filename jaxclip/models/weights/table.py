"""A checkpoint layout as a table with one row per parameter, used for loading and for saving.

Here "theirs" are the names and tensors of the other library, and "ours" those of this package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.weights.tensors import Tensors, abbreviate

LAYER = "{}"  # stands for the index of a layer in the name of a tensor
IGNORED = ("position_ids", "attn_mask")
"""Ends of the names of constants, not weights, that old releases stored in checkpoints; they are not loaded."""

Shape = tuple[int, ...]
Params = dict[str, Any]


@dataclass(frozen=True)
class Conversion:
    """Converts a tensor of the other library ("theirs") to an array of this package ("ours"), and back.

    Attributes:
      to_ours: (their tensor, our shape) -> our array.
      to_theirs: our array -> their tensor.
    """

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def same(leading: int = 0, flat: bool = False) -> Conversion:
    """Returns the conversion of vectors and embeddings, which only reshapes them.

    The other library's tensor has `leading` additional first axes of length one or, with `flat`, a single axis.
    """
    return Conversion(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1 if flat else (1,) * leading + x.shape))


def linear(inputs: int = 1) -> Conversion:
    """Returns the conversion of a linear map's kernel.

    The other library's is (out, in); ours has `inputs` input axes, then its output axes.
    """
    return Conversion(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(int(np.prod(x.shape[:inputs])), -1).T)


def patches(patch: int) -> Conversion:
    """Returns the conversion of the patch projection's kernel.

    The other library's is that of a convolution, (W, 3, P, P), and ours is (P * P * 3, W). P = `patch` is the side of a
    patch, W the width of the tower.
    """
    return Conversion(
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
        lambda x: x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
    )


@dataclass(frozen=True)
class TableRow:
    """One row of a layout's table: one parameter of this package and its tensor or tensors in the other library.

    Attributes:
      ours: name of our parameter.
      theirs: name of their tensor, or names of several that are concatenated along the outputs to form ours. "{}"
        stands for the index of a layer; layers are the first axis of ours.
      conversion: converts between their tensor and ours.
      resize: (their tensor (positions, width), our shape) -> ours, for position embeddings, whose number may differ;
        otherwise None.
      parts: relative sizes of their tensors if there are several; () if all have the same size.
    """

    ours: str
    theirs: str | tuple[str, ...]
    conversion: Conversion
    resize: Callable[[np.ndarray, Shape], np.ndarray] | None = None
    parts: tuple[int, ...] = ()

    def names(self, layer: int) -> list[str]:
        """Returns the names of the other library's tensors in one layer."""
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return [name.replace(LAYER, str(layer)) for name in theirs]

    def split(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Returns each of the other library's tensors as a part of `theirs`, in which they are concatenated."""
        if isinstance(self.theirs, str) or len(self.theirs) == 1:
            return [theirs]
        shares = np.cumsum(self.parts or (1,) * len(self.theirs))
        return np.split(theirs, shares[:-1] * len(theirs) // shares[-1])

    @property
    def stacked(self) -> bool:
        """Whether our parameter is a stack of layers."""
        return LAYER in (self.theirs if isinstance(self.theirs, str) else self.theirs[0])


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another library.

    Attributes:
      config: the shape of its towers.
      table: its layout.
      tensors: its tensors, which are loaded when they are read.
    """

    config: CLIPConfig
    table: list[TableRow]
    tensors: Tensors


def norm_rows(ours: str, theirs: str) -> list[TableRow]:
    """Returns the rows of a layer norm."""
    return [TableRow(f"{ours}/scale", f"{theirs}.weight", same()), TableRow(f"{ours}/bias", f"{theirs}.bias", same())]


def linear_rows(
    ours: str, theirs: str | tuple[str, ...], *, inputs: int = 1, dot: str = ".", parts: tuple[int, ...] = ()
) -> list[TableRow]:
    """Returns the rows of a linear map with a bias.

    Args:
      ours: name of the linear map in this package.
      theirs: name of the linear map in the other library, or of several that ours combines.
      inputs: number of input axes of our kernel.
      dot: separator between the name of their linear map and "weight" or "bias".
      parts: see `TableRow`.
    """
    names = (theirs,) if isinstance(theirs, str) else theirs
    weights, biases = (tuple(f"{name}{dot}{kind}" for name in names) for kind in ("weight", "bias"))
    return [
        TableRow(f"{ours}/kernel", weights, linear(inputs), parts=parts),
        TableRow(f"{ours}/bias", biases, same(flat=True), parts=parts),
    ]


def load(table: Sequence[TableRow], tensors: Tensors, abstract: Params) -> Params:
    """Returns the nested parameters, each placed on the devices that `abstract` specifies.

    The parameters are loaded one at a time, the largest first, so that host memory holds only one that is not yet
    placed and the source tensors of one of its layers.

    Args:
      table: the layout, with exactly one row per parameter.
      tensors: the tensors of the checkpoint.
      abstract: nested dicts of shapes, dtypes and shardings.

    Raises:
      UserError: tensors are missing, have the wrong shape, or are unknown; the message names up to three of each kind.
      ValueError: the table does not have exactly one row per parameter.
    """
    rows, leaves = {row.ours: row for row in table}, flatten_dict(abstract, sep="/")
    if rows.keys() != leaves.keys():
        raise ValueError(
            f"the rows of the table and the parameters of the towers differ in {sorted(rows.keys() ^ leaves.keys())}"
        )
    _check(table, tensors, leaves)
    largest_first = sorted(leaves, key=lambda name: -leaves[name].size)
    loaded = {name: _place(_read_parameter(rows[name], tensors, leaves[name]), leaves[name]) for name in largest_first}
    return unflatten_dict({name: loaded[name] for name in leaves}, sep="/")


def save(table: Sequence[TableRow], params: Params) -> dict[str, np.ndarray]:
    """Returns the other library's tensors by name, in float32, and contiguous as safetensors requires."""
    tensors: dict[str, np.ndarray] = {}
    leaves = flatten_dict(params, sep="/")
    for row in table:
        ours = np.asarray(leaves[row.ours], np.float32)
        for layer, part in enumerate(ours if row.stacked else [ours]):
            for name, piece in zip(row.names(layer), row.split(row.conversion.to_theirs(part)), strict=True):
                tensors[name] = np.ascontiguousarray(piece).reshape(piece.shape)
    return tensors


def _read_parameter(row: TableRow, tensors: Tensors, leaf: Any) -> np.ndarray:
    if not row.stacked:
        return _read_layer(row, 0, tensors, leaf.shape, leaf.dtype)
    ours = np.empty(leaf.shape, leaf.dtype)
    for layer, target in enumerate(ours):
        target[...] = _read_layer(row, layer, tensors, target.shape, leaf.dtype)
    return ours


def _read_layer(row: TableRow, layer: int, tensors: Tensors, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns a parameter that is not stacked, or one layer of a stack."""
    parts = [tensors.read(name).astype(dtype, copy=False) for name in row.names(layer)]
    theirs = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if row.resize:
        return row.resize(theirs.reshape(-1, theirs.shape[-1]), shape)
    return row.conversion.to_ours(theirs, shape)


def _place(value: np.ndarray, leaf: Any) -> jax.Array:
    if leaf.sharding is None:
        return jax.numpy.asarray(value).block_until_ready()
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__).block_until_ready()


def _check(table: Sequence[TableRow], tensors: Tensors, abstract: Mapping[str, Any]) -> None:
    missing, misshaped, known = [], [], set()
    for row in table:
        shape = abstract[row.ours].shape
        for layer in range(shape[0] if row.stacked else 1):
            empty = np.broadcast_to(np.float32(0), shape[row.stacked :])
            for name, piece in zip(row.names(layer), row.split(row.conversion.to_theirs(empty)), strict=True):
                known.add(name)
                actual = tensors.shapes.get(name)
                if actual is None:
                    missing.append(name)
                elif actual != piece.shape and not (row.resize and actual[-1:] == piece.shape[-1:]):
                    misshaped.append(f"{name} is {actual}, not {piece.shape}")
    unknown = sorted(name for name in tensors.shapes.keys() - known if not name.endswith(IGNORED))
    problems = [
        f"{problem} {abbreviate(names)}"
        for problem, names in (("missing:", missing), ("wrong shape:", misshaped), ("unknown:", unknown))
        if names
    ]
    if problems:
        raise UserError(
            f"the weights in {tensors.folder} do not match the configuration in that folder ({'; '.join(problems)}): "
            "use the weights and the configuration of one model"
        )
