"""Data sheets of accelerators: peak FLOP/s by type, memory and networks, for plans, benchmarks and MFU."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax

BF16_PASSES = {"default": 1, "high": 3, "highest": 6}
"""Precision of a float32 product -> number of bfloat16 products that a TPU computes it from (jax.lax.Precision)."""


@dataclass(frozen=True)
class GPU:
    """What XLA's compiler must know about a GPU that is not there, as in XLA's own descriptions of GPUs.

    The descriptions are the files of xla/backends/gpu/target_config/specs.

    Attributes:
      name: the name by which the driver reports it.
      capability: major number of its compute capability.
      cores: number of streaming multiprocessors.
      fpus: float32 units per core.
      shared_memory: bytes of shared memory per core.
      shared_memory_optin: bytes of shared memory that one block can request.
      cache: bytes of L2 cache.
      clock: boost clock in GHz.
    """

    name: str
    capability: int
    cores: int
    fpus: int
    shared_memory: int
    shared_memory_optin: int
    cache: int
    clock: float


@dataclass(frozen=True)
class Chip:
    """The data sheet of one device, as JAX counts devices.

    Attributes:
      flops: dense FLOP/s of matrix products by the type that the hardware multiplies: "bfloat16", and on GPUs also
        "tf32" and "float32".
      memory: bytes of device memory that a program may use.
      memory_bandwidth: bytes/s to and from the device's memory.
      link: bytes/s in one direction of one link to a neighbour (TPUs), or of all of NVLink (GPUs).
      between: bytes/s that a device can send to another slice (TPUs) or machine (GPUs).
      wraps: for TPUs, an axis of the topology is closed to a ring if its length is a multiple of this.
      gpu: for GPUs, what the compiler must know in addition.
    """

    flops: Mapping[str, float]
    memory: float
    memory_bandwidth: float
    link: float
    between: float
    wraps: int | None = None
    gpu: GPU | None = None

    def peak(self, dtype: str, precision: str = "default") -> float:
        """Returns the peak FLOP/s of matrix products of operands of this type and jax.lax.Precision.

        TPUs compute float32 products from bfloat16 products: 1, 3 or 6 for the precision default, high or highest. GPUs
        compute them in TF32, and at the precision highest in float32.
        """
        if dtype in ("bfloat16", "float16"):
            return self.flops["bfloat16"]
        if dtype != "float32":
            raise ValueError(f"the data sheets have no FLOP/s for products of {dtype}")
        if "float32" in self.flops:
            return self.flops["float32" if precision == "highest" else "tf32"]
        return self.flops["bfloat16"] / BF16_PASSES[precision]


def _tpu(flops: float, memory: float, bandwidth: float, link: float, between: float, wraps: int) -> Chip:
    return Chip({"bfloat16": flops}, memory, bandwidth, link, between, wraps)


def _gpu(
    flops: tuple[float, float, float], memory: float, bandwidth: float, link: float, between: float, gpu: GPU
) -> Chip:
    return Chip(
        dict(zip(("bfloat16", "tf32", "float32"), flops, strict=True)), memory, bandwidth, link, between, gpu=gpu
    )


GIB = 2**30
GPUS_PER_MACHINE = 8

# TPUs: docs.cloud.google.com/tpu/docs (system architecture of each version). libtpu reserves 1.25 GiB of the memory of
# a v4, 0.25 of a v5e and 0.75 of a v6e. The pages of v5p, v6e and 7x give the bandwidth of all links of a chip in both
# directions (1,200, 800 and 1,200 GB/s); one link has 50 GB/s in v4 and v5e (1,600 Gb/s over four ports) and 100 GB/s
# in v5p and v6e. `between` is the data-centre bandwidth per chip; for v4, whose page has none, that of v5p. A 7x chip
# is two devices, each with half of the chip's figures. An axis of a v5e or v6e is a ring if it has 16 chips, one of the
# others if its length is a multiple of 4.
# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX B200, dense; those of Hopper and Blackwell
# print twice as much, with sparsity. NVLink has half of the printed sum of both directions. `between` is one network
# adapter per GPU, as in DGX systems: 200 Gb/s (DGX A100) or 400 Gb/s.
CHIPS = {
    "v4": _tpu(275e12, 30.75 * GIB, 1.2e12, 50e9, 6.25e9, wraps=4),
    "v5e": _tpu(197e12, 15.75 * GIB, 819e9, 50e9, 3.125e9, wraps=16),
    "v5p": _tpu(459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, wraps=4),
    "v6e": _tpu(918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, wraps=16),
    "7x": _tpu(1153.5e12, 96 * GIB, 3690e9, 50e9, 6.25e9, wraps=4),
    "a100": _gpu((312e12, 156e12, 19.5e12), 80e9, 2039e9, 300e9, 25e9,
                 GPU("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41)),
    "h100": _gpu((989e12, 494.5e12, 67e12), 80e9, 3350e9, 450e9, 50e9,
                 GPU("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 232448, 52428800, 1.98)),
    "h200": _gpu((989e12, 494.5e12, 67e12), 141e9, 4800e9, 450e9, 50e9,
                 GPU("NVIDIA H200 141GB HBM3e", 9, 132, 128, 233472, 232448, 52428800, 1.98)),
    "b200": _gpu((2250e12, 1125e12, 75e12), 180e9, 7700e9, 900e9, 50e9,
                 GPU("NVIDIA B200", 10, 148, 128, 233472, 232448, 132644864, 1.965)),
}  # fmt: skip


KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "7x", "A100": "a100", "H100": "h100", "H200": "h200", "B200": "b200",
}  # fmt: skip
"""Words of JAX's `device_kind` -> key of CHIPS; the first that `device_kind` contains is used."""


def chip(device: jax.Device) -> Chip | None:
    """Returns the data sheet of a device, or None for an unknown kind, such as the PCIe and NVL variants of GPUs."""
    if re.search(r"PCIe|NVL", device.device_kind):
        return None
    known = (name for kind, name in KINDS.items() if re.search(rf"\b{kind}\b", device.device_kind))
    return CHIPS[name] if (name := next(known, None)) else None
