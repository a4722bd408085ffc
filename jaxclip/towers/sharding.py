"""How each parameter is sharded over the mesh: by the first rule that applies, or else over fsdp unless it is small."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxclip.runtime.mesh import slices_of

Rules = Sequence[tuple[str, PartitionSpec]]


# Regex that is searched in a parameter's name -> mesh axis of each dimension; `shardings` says which rule applies.
# Shapes: L is the number of layers, W the width, H the number of heads, D the width of a head, M the width of the MLP,
# V the size of the vocabulary and R the rank of an adapter.
RULES: Rules = (
    (r"attention/qkv/kernel", PartitionSpec(None, "fsdp", None, "tensor", None)),  # (L, W, 3, H, D)
    (r"attention/qkv/bias", PartitionSpec(None, None, "tensor", None)),  # (L, 3, H, D)
    (r"attention/out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),  # (L, H, D, W)
    (r"mlp_in/kernel", PartitionSpec(None, "fsdp", "tensor")),  # (L, W, M)
    (r"mlp_in/bias", PartitionSpec(None, "tensor")),  # (L, M)
    (r"mlp_out/kernel", PartitionSpec(None, "tensor", "fsdp")),  # (L, M, W)
    (r"token_embedding/embedding", PartitionSpec("tensor", "fsdp")),  # (V, W)
    (r"attention/qkv/lora/b", PartitionSpec(None, None, None, "tensor", None)),  # (L, R, 3, H, D)
    (r"attention/out/lora/a", PartitionSpec(None, "tensor", None, None)),  # (L, H, D, R)
    (r"mlp_in/lora/b", PartitionSpec(None, None, "tensor")),  # (L, R, M)
    (r"mlp_out/lora/a", PartitionSpec(None, "tensor", None)),  # (L, M, R)
)


def names(tree: Any) -> Any:
    """Returns the tree with each leaf replaced by its path, such as "image/projection/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a NamedSharding for each leaf (array or shape) of a tree whose paths contain parameters' names.

    A rule applies if its regex matches part of the name, it has an entry for each dimension of the leaf, and each mesh
    axis in it divides its dimension. If no rule applies, the largest dimension that the fsdp axis divides is split over
    fsdp. If there is none, or the array has fewer than 2^14 values, it is replicated. Optimizer state has its
    parameters' names in its paths and is sharded like them.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, name) and len(spec) == leaf.ndim and _divides(spec, leaf.shape, mesh):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _fallback(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map(place, names(tree), tree)


def place_shapes(shapes: Any, mesh: Mesh) -> Any:
    """Returns the shape of each leaf together with its sharding on the mesh (see `shardings`)."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh),
    )


def sharding_table(params: Any, mesh: Mesh) -> str:
    """Returns a table of the parameters (arrays, or shapes with sharding): name, shape, mesh axes, size per device."""
    lines = [f"{'parameter':44}{'shape':>24}  {'spec':34}{'per device':>12}"]
    total = 0
    for name, leaf in zip(jax.tree.leaves(names(params)), jax.tree.leaves(params), strict=True):
        size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        total += size
        spec = ", ".join(str(axis or "-") for axis in leaf.sharding.spec) or "replicated"
        lines.append(f"{name:44}{str(leaf.shape):>24}  {spec:34}{size / 2**10:>8,.1f} KiB")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = len(set(slices_of(mesh)))
    where = f" in {count} slices" if count > 1 else ""
    lines.append(f"mesh {sizes}{where}: {total / 2**20:,.2f} MiB of parameters per device")
    return "\n".join(lines)


def _divides(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))


def _fallback(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0 and size >= fsdp]
    if fsdp == 1 or not fitting or np.prod(shape) < 2**14:
        return PartitionSpec()
    widest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == widest else None for axis in range(len(shape))))
