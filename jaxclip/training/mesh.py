"""The device mesh and where each array lives on it."""

import re
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxclip.errors import UserError
from jaxclip.models.transformer import BATCH_AXES
from jaxclip.training import distributed

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]

# Blocks have their layers as first axis. The first rule whose regex is found in a parameter's name holds.
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


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of all (or the given) devices; one axis may be -1 for what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not match {len(devices)} devices"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def connect(mesh: Mesh) -> None:
    """Opens what the collectives on a mesh of several processes' devices need, in one place that all come to.

    Else it is opened where it is first needed, and there Gloo, which connects CPUs, gives up after 30 seconds if one
    process is late, as by compiling or by waiting for data. Once open, collectives wait for as long as it takes.
    """
    if distributed.process_count() == 1:
        return
    wide = [axis for axis in AXES if mesh.shape[axis] > 1]
    groups = list(chain.from_iterable(combinations(wide, size) for size in range(1, len(wide) + 1)))
    whole = NamedSharding(mesh, PartitionSpec())
    add = jax.shard_map(
        lambda x: [jax.lax.psum(x, axes) for axes in groups],
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
    )
    one = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    compiled = jax.jit(add).lower(one).compile()
    distributed.meet("connect")
    jax.block_until_ready(compiled(jax.make_array_from_callback((), whole, lambda _: np.ones((), np.float32))))
    multihost_utils.sync_global_devices("connect")  # as Orbax and `embed` use


def names(tree: Any) -> Any:
    """Returns the tree with each leaf replaced by its path, as "image/projection/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Returns a NamedSharding for each leaf (arrays or their shapes) of a tree that has parameters' names in its paths.

    Where no rule holds, or a rule's axis does not divide its dimension, the largest dimension that fsdp divides is
    split over fsdp, and where there is none the array is replicated. Optimizer state carries its parameters' names and
    so is sharded as they are.
    """

    def place(name: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, name) and len(spec) == leaf.ndim and _divides(spec, leaf.shape, mesh):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _fallback(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map(place, names(tree), tree)


def table(params: Any, mesh: Mesh) -> str:
    """Returns a line for each parameter (array, or shape with sharding): name, shape, axes it is split over, bytes."""
    lines = [f"{'parameter':44}{'shape':>24}  {'spec':34}{'per device':>12}"]
    total = 0
    for name, leaf in zip(jax.tree.leaves(names(params)), jax.tree.leaves(params), strict=True):
        size = int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        total += size
        spec = ", ".join(str(axis or "-") for axis in leaf.sharding.spec) or "replicated"
        lines.append(f"{name:44}{str(leaf.shape):>24}  {spec:34}{size / 2**10:>8,.1f} KiB")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines.append(f"mesh {sizes}: {total / 2**20:,.2f} MiB of parameters per device")
    return "\n".join(lines)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns which rows of a global batch lie on this process's devices, ascending.

    They need not be neighbours: a mesh follows the wires between the chips, not the numbers of the hosts.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({rows.indices(batch_size)[:2] for (rows,) in held})
    return np.concatenate([np.arange(*span) for span in spans])


def place_rows(sharding: NamedSharding, batch_size: int, rows: np.ndarray) -> jax.Array:
    """Returns the global array of `batch_size` rows of which this process has those of `process_rows`."""
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))


def rows(mesh: Mesh) -> int:
    """Returns the number by which a batch's rows must be divisible on this mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(mesh: Mesh, key: str, given: int) -> None:
    """UserError where the rows that a key of the configuration gives are not divisible on this mesh."""
    if given % rows(mesh):
        raise UserError(f"config.{key} = {given} is no multiple of mesh data x fsdp = {rows(mesh)}")


def _divides(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> bool:
    return all(axis is None or size % mesh.shape[axis] == 0 for axis, size in zip(spec, shape, strict=True))


def _fallback(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    fitting = [axis for axis, size in enumerate(shape) if size % fsdp == 0 and size >= fsdp]
    if fsdp == 1 or not fitting or np.prod(shape) < 2**14:
        return PartitionSpec()
    widest = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == widest else None for axis in range(len(shape))))
