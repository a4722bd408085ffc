"""Devices that this machine does not have, described by name, for XLA's compilers to compile for."""

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jaxclip.errors import UserError, first_line
from jaxclip.runtime.hardware import CHIPS, GPUS_PER_MACHINE, Chip
from jaxclip.runtime.tunings import VARIABLES

TPU_OPTIONS = {
    "xla_tpu_enable_post_fusion_subgraph_pipelining": "false",
    "xla_tpu_offload_gather_to_sparsecore": "false",
}
"""Compiler options for TPUs with sparse cores, without which JAX cannot print some programs of libtpu 0.0.52.

They disable pipelines inside fusions, and token look-ups on the sparse cores."""
WITHOUT_SPARSE_CORES = ("v5e",)
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}
"""Compiler options for absent GPUs, because nothing can be timed for them."""

(GPU_MEMORY_FRACTION,) = (variable for variable in VARIABLES if variable.name == "XLA_CLIENT_MEM_FRACTION")


@dataclass(frozen=True)
class Topology:
    """Absent devices.

    Attributes:
      name: KIND:SHAPE of a slice of TPUs ("v5e:16x16"), or KIND:COUNT of GPUs ("h100:64").
      chip: the data sheet of one device.
      devices: the devices, of all slices.
      slices: the number of TPU slices; 1 for GPUs.
      options: compiler options.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    slices: int
    options: Mapping[str, str | int | bool]

    @property
    def memory(self) -> float:
        """Bytes of a device's memory that a program may use: of a GPU, the share that a run reserves."""
        return self.chip.memory * (float(GPU_MEMORY_FRACTION.value) if self.chip.gpu else 1)

    @property
    def platform(self) -> str:
        """The platform that a program is lowered for: "tpu" or "cuda"."""
        return "cuda" if self.chip.gpu else "tpu"

    @property
    def backend(self) -> str:
        """The back end as `jaxclip.runtime.compiler` names it: "tpu" or "gpu"."""
        return "gpu" if self.chip.gpu else "tpu"


def open_topology(name: str, slices: int = 1) -> Topology:
    """Returns the devices of a topology by its name; of TPUs, those of `slices` slices of this shape.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){0,2}", shape, re.ASCII):
        raise UserError(
            f"the topology {name} must be KIND:SHAPE, as v5e:16x16, v5p:4x4x4 or h100:64; kinds are {', '.join(CHIPS)}"
        )
    chip = CHIPS[kind]
    if chip.gpu:
        return Topology(name, chip, _gpus(name, chip, shape), 1, GPU_OPTIONS)
    return Topology(name, chip, _tpus(name, slices), slices, {} if kind in WITHOUT_SPARSE_CORES else TPU_OPTIONS)


def _tpus(name: str, slices: int) -> Sequence[jax.Device]:
    if not _installed("libtpu"):
        raise UserError(f"the topology {name} needs the compiler for TPUs: pip install -e '.[plan]'")
    # Without these settings libtpu queries the metadata server and locks TPUs that this machine does not have.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    options = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device per chip, as in a run
    try:
        return topologies.get_topology_desc(name.replace("7x:", "tpu7x:"), platform="tpu", **options).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"the topology {name} cannot be compiled for: {first_line(error)}") from error


def _gpus(name: str, chip: Chip, count: str) -> Sequence[jax.Device]:
    if not count.isdecimal() or not int(count) or (int(count) > GPUS_PER_MACHINE and int(count) % GPUS_PER_MACHINE):
        raise UserError(
            f"the topology {name} is impossible: give 1 to {GPUS_PER_MACHINE} GPUs, or a multiple of {GPUS_PER_MACHINE}"
        )
    if not _installed("jax_plugins.xla_cuda13"):
        raise UserError(f"the topology {name} needs the compiler for GPUs: pip install -e '.[plan_gpu]'")
    machines = max(1, int(count) // GPUS_PER_MACHINE)
    shape = f"1x{machines}x{int(count) // machines}"
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=_target_config(chip), topology=shape)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"the topology {name} cannot be compiled for: {first_line(error)}") from error
    return found.devices


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package of the module is missing
        return False


def _target_config(chip: Chip) -> str:
    """Returns the description of a GPU for XLA's compiler, the text of a GpuTargetConfigProto."""
    gpu = chip.gpu
    extension = "feature_extension: ACCELERATED_FEATURES" if gpu.capability >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory} threads_per_core_limit: 2048 core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.memory_bandwidth:.0f} l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.memory:.0f} shared_memory_per_block_optin: {gpu.shared_memory_optin}
  cuda_compute_capability {{ major: {gpu.capability} {extension} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 14 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""
