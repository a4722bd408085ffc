"""The device mesh, and how batches are placed on it."""

from collections.abc import Sequence
from itertools import chain, combinations

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxclip.errors import UserError
from jaxclip.runtime import distributed

BATCH_AXES = ("data", "fsdp")
AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of all (or the given) devices; one axis may be -1, for the remaining devices.

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
            f"config.mesh: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not match {len(devices)} devices: "
            "give sizes whose product is the number of devices"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def open_collectives(mesh: Mesh) -> None:
    """Opens the connections for collectives between the processes of a mesh; all processes must call it.

    Otherwise the first collective opens them, and then Gloo, which connects CPUs, gives up after 30 seconds if one
    process is late because it compiles or waits for data. Open connections have no such time limit.
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
    distributed.barrier("connect")
    jax.block_until_ready(compiled(jax.make_array_from_callback((), whole, lambda _: np.ones((), np.float32))))
    multihost_utils.sync_global_devices("connect")  # opens the connections that Orbax and `embed` use


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that are on this process's devices, in ascending order.

    They need not be adjacent: a mesh orders devices by the chips' interconnect, not by their hosts.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    spans = sorted({rows.indices(batch_size)[:2] for (rows,) in slices})
    return np.concatenate([np.arange(*span) for span in spans])


def place_rows(sharding: NamedSharding, batch_size: int, rows: np.ndarray) -> jax.Array:
    """Returns the global array of `batch_size` rows from the rows of this process (see `process_rows`)."""
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))


def batch_multiple(mesh: Mesh) -> int:
    """Returns the number that must divide the number of rows of a batch on this mesh: data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(mesh: Mesh, key: str, rows: int) -> None:
    """Raises a UserError unless `batch_multiple` divides the number of rows, the value of a configuration key."""
    if rows % batch_multiple(mesh):
        raise UserError(
            f"config.{key} = {rows} is not a multiple of mesh data x fsdp = {batch_multiple(mesh)}: change one"
        )
