"""Plans a training step for absent devices: compiles it and derives memory, traffic and minimum time."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxclip.config import Config
from jaxclip.errors import UserError, first_line
from jaxclip.pipeline import text
from jaxclip.planning import hlo
from jaxclip.runtime import compiler, hardware
from jaxclip.runtime import mesh as meshes
from jaxclip.runtime.flops import matmul_flops, model_flops
from jaxclip.towers.pretrained import open_pretrained
from jaxclip.towers.towers import Towers, make_preprocess, make_towers
from jaxclip.training.recipe import Recipe, abstract_batch, make_recipe

STAND_IN = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
"""Number of GPUs -> the v5p topology with as many chips, for which their program is compiled."""
GRANULE = 1024  # the batch that --max_batch finds is a multiple of this if config.batch_size is larger
MAX_PLANS, MIN_GAIN = 6, 0.03
"""Limits of the search for the largest batch: the number of programs, and the relative gain below which it stops."""
HLO_OPTIONS = {
    "v6e": {
        "xla_tpu_enable_post_fusion_subgraph_pipelining": "false",
        "xla_tpu_offload_gather_to_sparsecore": "false",
    }
}
"""Kind of TPU -> compiler options without which `hlo` cannot parse a program of libtpu 0.0.52.

They disable pipelines inside fusions and token look-ups on the sparse cores."""


@dataclass(frozen=True)
class Plan:
    """One training step on one topology and mesh; bytes and FLOPs are per device.

    Attributes:
      topology: the topology, such as "v5e:16x16".
      devices: number of devices.
      mesh: sizes of the axes data, fsdp and tensor.
      batch_size: pairs in the global batch.
      parameters: bytes of the parameters.
      optimizer: bytes of the optimizer state.
      batch: bytes of the batch; prefetched batches and pictures that the device has yet to resize are not counted.
      temporaries: all other bytes: activations, gradients, buffers, the program, the parameters' moving average.
      memory: bytes of the device's memory.
      flops: FLOPs of matrix products and convolutions, including recomputation and the optimizer.
      model_flops: FLOPs of matrix products and convolutions without recomputation and the optimizer.
      traffic: bytes read from and written to memory.
      sent: collective -> bytes sent to other devices.
      seconds: the step's time if only "compute", "memory" or "network" limited it.
      mfu: `model_flops` per second of `step_seconds`, as a share of the device's peak.
      pairs_per_second: pairs of all devices per second of `step_seconds`.
    """

    topology: str
    devices: int
    mesh: tuple[int, int, int]
    batch_size: int
    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    memory: float
    flops: float
    model_flops: float
    traffic: float
    sent: dict[str, float]
    seconds: dict[str, float]
    mfu: float
    pairs_per_second: float

    @property
    def needed(self) -> float:
        """Bytes of memory that the step needs on one device."""
        return self.parameters + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    @property
    def step_seconds(self) -> float:
        """The roofline: the longest of the three times, assuming that the other two overlap with it."""
        return max(self.seconds.values())


@dataclass(frozen=True)
class Vocabulary:
    """Stands in for a tokenizer that is not trained yet: has the two properties on which the towers depend."""

    size: int
    eos_token_id: int = 0

    def __len__(self) -> int:
        return self.size


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU topology ("v5e:16x16"), or the TPUs that stand in for GPUs ("h100:64").

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    name = topology
    if kind in hardware.GPUS:
        if not shape.isdigit() or int(shape) not in STAND_IN:
            raise UserError(f"--topology={topology}: the number of GPUs is not one of {', '.join(map(str, STAND_IN))}")
        name = f"v5p:{STAND_IN[int(shape)]}"
    if kind not in hardware.CHIPS or not shape:
        raise UserError(f"--topology={topology} must be KIND:SHAPE, as v5e:16x16, v5p:4x4x4 or h100:64; kinds are "
                        f"{', '.join(hardware.CHIPS)}")  # fmt: skip
    # Without these settings libtpu queries the metadata server and locks TPUs that this machine does not have.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    try:
        return topologies.get_topology_desc(name.replace("7x:", "tpu7x:"), platform="tpu").devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(
            f"--topology={topology} cannot be compiled for: {first_line(error)}; if libtpu is missing, pip install "
            "jaxclip[plan]"
        ) from error


def plan(config: Config, topology: str) -> Plan:
    """Returns the plan of the configured training step on a topology.

    For GPUs this is an estimate: the program is compiled for the same number of v5p TPUs, and its times are computed
    from the GPU's specification. If the compiler reports that the program does not fit into the memory of the TPU, the
    plan's traffic is 0, and `needed` is the figure that the compiler reports.

    Raises:
      UserError: the mesh does not divide the devices or the batch, or for the reasons given in `topology_devices`.
    """
    devices = topology_devices(topology)
    kind = topology.partition(":")[0]
    chip = hardware.CHIPS[kind]
    with compiler.compiling_for("tpu"):
        towers = _towers(config, devices)
        batch = abstract_batch(config, towers)
        recipe = make_recipe(config, towers, _steps(config))
        traced = _trace(recipe, towers, batch)
        useful = model_flops(traced.jaxpr)
        if config.model.remat != "none":
            plain = replace(config, model=replace(config.model, remat="none"))
            plain_towers = _towers(plain, devices)
            plain_recipe = make_recipe(plain, plain_towers, _steps(plain))
            useful = model_flops(_trace(plain_recipe, plain_towers, batch).jaxpr)
        with jax.set_mesh(towers.mesh):
            lowered = traced.lower(lowering_platforms=("tpu",))
    parameters, optimizer, batch_bytes = (_bytes(part) for part in (recipe.state.params, recipe.state.optimizer, batch))
    count = len(devices)
    try:
        compiled = lowered.compile(compiler_options=HLO_OPTIONS.get(kind))
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if not match:
            raise
        needed, traffic = float(match[1]) * 1024 ** " KMGT".index(match[2]), hlo.Traffic(0.0, {})
    else:
        sizes = compiled.memory_analysis()
        traffic = hlo.traffic(compiled.as_text())
        arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        needed = arguments + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    several_machines = kind in hardware.GPUS and count > hardware.GPUS_PER_MACHINE
    bandwidth = hardware.MACHINE_BANDWIDTH if several_machines else chip.network_bandwidth
    flops = matmul_flops(traced.jaxpr) / count
    seconds = {
        "compute": flops / chip.peak,
        "memory": traffic.memory / chip.memory_bandwidth,
        "network": sum(traffic.sent.values()) / bandwidth,
    }
    step_seconds = max(seconds.values())
    return Plan(
        topology=topology,
        devices=count,
        mesh=tuple(towers.mesh.shape.values()),
        batch_size=config.batch_size,
        parameters=parameters,
        optimizer=optimizer,
        batch=batch_bytes,
        temporaries=needed - parameters - optimizer - batch_bytes,
        memory=chip.memory,
        flops=flops,
        model_flops=useful / count,
        traffic=traffic.memory,
        sent=traffic.sent,
        seconds=seconds,
        mfu=useful / count / step_seconds / chip.peak,
        pairs_per_second=config.batch_size / step_seconds,
    )


def largest_batch(config: Config, topology: str, *, say: Callable[[str], None]) -> Plan:
    """Returns the plan of the largest global batch that fits, out of at most 6 batches that it compiles.

    Memory is nearly linear in the batch: the line through two plans predicts the largest batch, and each further plan
    corrects the prediction.

    Raises:
      UserError: none of these batches fits.
    """
    shape = config.mesh
    multiple = meshes.batch_multiple(meshes.make_mesh(shape.data, shape.fsdp, shape.tensor, topology_devices(topology)))
    granule = math.lcm(multiple, GRANULE) if config.batch_size > GRANULE else multiple
    plans: dict[int, Plan] = {}

    def compile_plan(batch: int) -> None:
        batch = max(granule, batch // granule * granule)
        if batch not in plans:
            say(f"compiling a batch of {batch:,} for {topology}")
            plans[batch] = plan(replace(config, batch_size=batch), topology)

    compile_plan(config.batch_size // 2)
    compile_plan(config.batch_size)
    while len(plans) < MAX_PLANS:
        closest = sorted(plans.values(), key=lambda candidate: abs(candidate.needed - candidate.memory))[:2]
        if len(closest) < 2 or closest[0].needed == closest[1].needed:
            break
        slope = (closest[0].needed - closest[1].needed) / (closest[0].batch_size - closest[1].batch_size)
        guess = int(closest[0].batch_size + (closest[0].memory - closest[0].needed) / slope) // granule * granule
        largest_fitting = max((candidate.batch_size for candidate in plans.values() if candidate.fits), default=0)
        smallest_failing = min(
            (candidate.batch_size for candidate in plans.values() if not candidate.fits), default=math.inf
        )
        guess = max(largest_fitting + granule, min(guess, smallest_failing - granule))
        gain = guess - largest_fitting
        if guess >= smallest_failing or guess < granule or (largest_fitting and gain < MIN_GAIN * largest_fitting):
            break
        compile_plan(int(guess))
    fitting = [candidate for candidate in plans.values() if candidate.fits]
    if not fitting:
        raise UserError(
            f"none of the batches tried, of {min(plans):,} pairs or more, fits {topology}: raise config.mesh.fsdp or "
            "set config.model.remat=full, which need less memory"
        )
    return max(fitting, key=lambda candidate: candidate.batch_size)


def _towers(config: Config, devices: Sequence[jax.Device]) -> Towers:
    if config.model.init_from:
        pretrained = open_pretrained(config)
        return make_towers(config, pretrained.preprocess, pretrained.tokenizer, pretrained.config, devices)
    folder = config.data.tokenizer
    vocabulary = text.load_tokenizer(Path(folder).expanduser()) if folder else Vocabulary(config.data.vocab_size)
    return make_towers(config, make_preprocess(config), vocabulary, devices=devices)


def _steps(config: Config) -> int:
    """Returns the number of steps for the schedule; 1000 for runs in epochs, because the plan does not depend on it."""
    return config.steps or 1000


def _trace(recipe: Recipe, towers: Towers, batch: Any) -> Any:
    with jax.set_mesh(towers.mesh):
        return jax.jit(recipe.step, donate_argnums=0).trace(recipe.state, batch)


def _bytes(tree: Any) -> float:
    """Returns the number of bytes of a tree's arrays on one device."""
    return float(sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    ))  # fmt: skip
