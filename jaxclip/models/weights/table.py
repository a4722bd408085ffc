"""A layout as a table of names, theirs <-> ours, that is read in both directions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxclip.errors import UserError
from jaxclip.models.clip import CLIPConfig
from jaxclip.models.weights.tensors import Tensors, listed

LAYER = "{}"
IGNORED = ("position_ids", "attn_mask")
"""Constants that old releases stored beside the weights."""

Shape = tuple[int, ...]
Params = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """How one of their tensors becomes ours, and ours theirs.

    Attributes:
      ours: (theirs, our shape) -> ours.
      theirs: ours -> theirs.
    """

    ours: Callable[[np.ndarray, Shape], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def same(leading: int = 0, flat: bool = False) -> Form:
    """Returns the form of vectors and embeddings; theirs have so many axes of length one in front, or one axis."""
    return Form(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1 if flat else (1,) * leading + x.shape))


def linear(inputs: int = 1) -> Form:
    """Returns the form of a linear map: theirs is (out, in), ours has `inputs` axes of inputs, then the outputs'."""
    return Form(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(int(np.prod(x.shape[:inputs])), -1).T)


def patches(patch: int) -> Form:
    """Returns the form of the map of patches: theirs is a convolution's (W, 3, P, P), ours (P * P * 3, W)."""
    return Form(
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
        lambda x: x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
    )


@dataclass(frozen=True)
class TableRow:
    """One line of a layout's table.

    Attributes:
      ours: name of our parameter.
      theirs: name of their tensor, or names of those that ours holds one after the other along its outputs. A "{}"
        stands for the number of a layer, which is the first axis of ours.
      form: how each becomes the other.
      resize: (their (T, W), our shape) -> ours; positions alone may differ in size.
      parts: relative sizes of their tensors where there are several; () = all alike.
    """

    ours: str
    theirs: str | tuple[str, ...]
    form: Form
    resize: Callable[[np.ndarray, Shape], np.ndarray] | None = None
    parts: tuple[int, ...] = ()

    def names(self, layer: int) -> list[str]:
        """Returns the names of their tensors in one layer."""
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return [name.replace(LAYER, str(layer)) for name in theirs]

    def pieces(self, theirs: np.ndarray) -> list[np.ndarray]:
        """Returns what each of their tensors is of all of them together, views."""
        if isinstance(self.theirs, str) or len(self.theirs) == 1:
            return [theirs]
        shares = np.cumsum(self.parts or (1,) * len(self.theirs))
        return np.split(theirs, shares[:-1] * len(theirs) // shares[-1])

    @property
    def stacked(self) -> bool:
        """Whether ours holds all layers."""
        return LAYER in (self.theirs if isinstance(self.theirs, str) else self.theirs[0])


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint of another library: the towers it holds, the table of its names and its tensors, not read yet."""

    config: CLIPConfig
    table: list[TableRow]
    tensors: Tensors


def norm_rows(ours: str, theirs: str) -> list[TableRow]:
    """Returns the rows of a layer norm."""
    return [TableRow(f"{ours}/scale", f"{theirs}.weight", same()), TableRow(f"{ours}/bias", f"{theirs}.bias", same())]


def linear_rows(
    ours: str, theirs: str | tuple[str, ...], *, inputs: int = 1, dot: str = ".", parts: tuple[int, ...] = ()
) -> list[TableRow]:
    """Returns the rows of a linear map with a bias; `dot` is what parts its name from those of its two tensors."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    weights, biases = (tuple(f"{name}{dot}{kind}" for name in names) for kind in ("weight", "bias"))
    return [
        TableRow(f"{ours}/kernel", weights, linear(inputs), parts=parts),
        TableRow(f"{ours}/bias", biases, same(flat=True), parts=parts),
    ]


def load(table: Sequence[TableRow], tensors: Tensors, abstract: Params) -> Params:
    """Returns the parameters, read one after the other straight to where `abstract` places them.

    Host memory holds one parameter and its source tensors at a time; the largest are loaded first.

    Args:
      table: the layout; its rows are our parameters, no more and no fewer.
      tensors: the checkpoint.
      abstract: nested dicts of shapes, dtypes and shardings.

    Raises:
      UserError: tensors are missing, have another shape, or are left over; all are named.
    """
    rows, leaves = {row.ours: row for row in table}, flatten_dict(abstract, sep="/")
    if rows.keys() != leaves.keys():
        raise ValueError(f"the table and the towers disagree about {sorted(rows.keys() ^ leaves.keys())}")
    _check(table, tensors, leaves)
    largest_first = sorted(leaves, key=lambda name: -leaves[name].size)
    loaded = {name: _place(_parameter(rows[name], tensors, leaves[name]), leaves[name]) for name in largest_first}
    return unflatten_dict({name: loaded[name] for name in leaves}, sep="/")


def save(table: Sequence[TableRow], params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name, float32 and contiguous as safetensors wants them."""
    tensors: dict[str, np.ndarray] = {}
    leaves = flatten_dict(params, sep="/")
    for row in table:
        ours = np.asarray(leaves[row.ours], np.float32)
        for layer, part in enumerate(ours if row.stacked else [ours]):
            for name, piece in zip(row.names(layer), row.pieces(row.form.theirs(part)), strict=True):
                tensors[name] = np.ascontiguousarray(piece).reshape(piece.shape)
    return tensors


def _parameter(row: TableRow, tensors: Tensors, leaf: Any) -> np.ndarray:
    if not row.stacked:
        return _one(row, 0, tensors, leaf.shape, leaf.dtype)
    ours = np.empty(leaf.shape, leaf.dtype)
    for layer, target in enumerate(ours):
        target[...] = _one(row, layer, tensors, target.shape, leaf.dtype)
    return ours


def _one(row: TableRow, layer: int, tensors: Tensors, shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Returns our parameter, or one layer of it."""
    parts = [tensors.read(name).astype(dtype, copy=False) for name in row.names(layer)]
    theirs = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return row.resize(theirs.reshape(-1, theirs.shape[-1]), shape) if row.resize else row.form.ours(theirs, shape)


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
            for name, piece in zip(row.names(layer), row.pieces(row.form.theirs(empty)), strict=True):
                known.add(name)
                found = tensors.shapes.get(name)
                if found is None:
                    missing.append(name)
                elif found != piece.shape and not (row.resize and found[-1:] == piece.shape[-1:]):
                    misshaped.append(f"{name} is {found}, not {piece.shape}")
    extra = sorted(name for name in tensors.shapes.keys() - known if not name.endswith(IGNORED))
    problems = [
        f"{what} {listed(names)}"
        for what, names in (("missing:", missing), ("of another shape:", misshaped), ("not known:", extra))
        if names
    ]
    if problems:
        raise UserError(f"the weights in {tensors.folder} do not fit its configuration; {'; '.join(problems)}")
