"""The device mesh, the slices it spans, and how batches are placed on it.

A slice is a set of devices with a network of their own that is faster than the network between slices: TPUs joined by
their interconnect, or the GPUs of one machine. A mesh is made of one slice after another, so that only its first axis
crosses slices: no axis but `data`, unless the others are too large for a slice.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain, combinations

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxclip.errors import UserError
from jaxclip.runtime import distributed

BATCH_AXES = ("data", "fsdp")
AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None, *, slices: int = 0
) -> Mesh:
    """Returns the mesh of all (or the given) devices; one axis may be -1, for the remaining devices.

    The data axis is divided into equal parts, one for each slice, in the order of their numbers. Collectives over fsdp
    and tensor therefore stay inside a slice. On GPUs and CPUs, whose networks between machines serve any collective,
    fsdp x tensor may be larger than a slice unless `slices` is given; where it divides a slice it is inside one.

    Args:
      data, fsdp, tensor: the sizes of the axes.
      devices: the devices (default: those of all processes).
      slices: the number of slices that the devices must be in (`slice_of`); 0 = any number. GPUs or CPUs that are all
        in one slice can stand for any number of slices, each of consecutive devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or do not fit into slices.
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
    _check_slices(sizes, devices, slices)
    return mesh_of(dict(zip(AXES, sizes, strict=True)), devices)


def _check_slices(sizes: Sequence[int], devices: Sequence[jax.Device], slices: int) -> None:
    """Raises a UserError if the sizes (data, fsdp, tensor), or the number of slices, are not possible."""
    present, tpus = len(set(map(slice_of, devices))), devices[0].platform == "tpu"
    if slices not in (0, present) and (tpus or present > 1):
        raise UserError(
            f"config.mesh.slices = {slices}, but the {len(devices)} devices are in {present} "
            f"slice{'s' if present > 1 else ''}: set it to {present}, or to 0 for as many as there are"
        )
    wanted = slices or (present if tpus else 1)
    data, inner, size = sizes[0], math.prod(sizes[1:]), len(devices) // wanted
    if data % wanted and inner > max(1, size):
        raise UserError(
            f"config.mesh: fsdp x tensor = {inner} is more than the {size} devices of each of {wanted} slices: lower "
            "fsdp or tensor, because only data may cross slices"
        )
    if data % wanted:
        raise UserError(
            f"config.mesh.data = {data} is not a multiple of the number of slices, {wanted}: each slice must have the "
            "same share of data; change data, fsdp or tensor"
        )


def mesh_of(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of all (or the given) devices with these axes (name -> size), made of one slice after another.

    The slices follow each other along the first axis, and along further axes only if the first one is too short.
    Inside a slice, TPUs are ordered by their interconnect, all others by process and number.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.values())
    if devices[0].platform == "tpu":
        placed = _place_tpus(shape, devices)
    else:
        ordered = sorted(devices, key=lambda device: (slice_of(device), device.process_index, device.id))
        placed = np.array(ordered, dtype=object).reshape(shape)
    # Not jax.make_mesh: it refuses devices of several slices, and shapes that split an axis of a v5p's or v6e's torus.
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def _place_tpus(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    remaining, between = len(set(map(slice_of, devices))), []
    if remaining == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    for size in shape:
        between.append(math.gcd(size, remaining))
        remaining //= between[-1]
    inside = [size // outer for size, outer in zip(shape, between, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def slice_of(device: jax.Device) -> int:
    """Returns the number of the slice that a device is in; 0 for devices that belong to no slice, such as CPUs."""
    # In JAX 0.10 to 0.12, TPUs have `slice_index` in runs of several slices only, and GPUs always: the number of their
    # machine, or of their NVLink domain where that is larger. For absent GPUs it is always 0, but a machine of theirs
    # is one process.
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        return device.process_index
    return getattr(device, "slice_index", 0)


def slices_of(mesh: Mesh) -> np.ndarray:
    """Returns the slice of each device, (devices,), in the mesh's order, which is that of a program's partitions.

    Two devices communicate over the network between slices if and only if their slices differ. For several TPU slices
    XLA compiles the program of one: the groups of its collectives hold positions within a slice, from 0, and what
    crosses slices is a `send` to the host with the attribute `_xla_megascale_transfer_type`.
    """
    return np.array([slice_of(device) for device in mesh.devices.flat])


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
