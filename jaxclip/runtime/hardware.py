"""Peak FLOP/s, memory and bandwidths of accelerators from their data sheets, for plans and MFU."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """The data sheet of one device, as JAX counts devices.

    Attributes:
      peak: dense bfloat16 FLOP/s.
      memory: bytes of device memory that a program may use.
      memory_bandwidth: bytes/s to and from the device's memory.
      network_bandwidth: bytes/s that one device can send to its neighbours, over all its links together.
    """

    peak: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float


# TPUs: cloud.google.com/tpu/docs. GPUs: NVIDIA's data sheets; the network is NVLink in a machine. Both sources give the
# bandwidth of links as the sum of both directions; `network_bandwidth` is half of it. A v5e reserves 0.25 GiB of its
# 16 GiB of memory, a v6e 0.75 GiB of its 32 GiB; a 7x chip is two devices, each with half of the chip's figures.
CHIPS = {
    "v4": Chip(275e12, 32e9, 1.23e12, 150e9),
    "v5e": Chip(197e12, 15.75 * 2**30, 0.82e12, 100e9),
    "v5p": Chip(459e12, 95e9, 2.77e12, 300e9),
    "v6e": Chip(918e12, 31.25 * 2**30, 1.64e12, 224e9),
    "7x": Chip(1153e12, 96e9, 3.69e12, 300e9),
    "a100": Chip(312e12, 80e9, 2.04e12, 300e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "b200": Chip(2250e12, 180e9, 8.0e12, 900e9),
}
GPUS = ("a100", "h100", "h200", "b200")
GPUS_PER_MACHINE, MACHINE_BANDWIDTH = 8, 50e9
"""GPUs connected by NVLink, and the bytes/s that each can send to another machine (400 Gb/s InfiniBand)."""
KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "7x", "A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200",
}  # fmt: skip
"""Part of JAX's `device_kind` -> key of CHIPS; the first part that `device_kind` contains is used."""


def chip(device: jax.Device) -> Chip | None:
    """Returns the data sheet of a device, or None for an unknown kind of device."""
    return next((CHIPS[name] for kind, name in KINDS.items() if kind in device.device_kind), None)
