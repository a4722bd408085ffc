"""Plans a training step for absent devices: compiles it and derives memory, traffic and minimum time."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from jaxclip.config import Config
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.planning.cost import Operation, program_cost
from jaxclip.planning.topologies import Topology, open_topology
from jaxclip.runtime import compiler
from jaxclip.runtime import mesh as meshes
from jaxclip.towers.pretrained import open_pretrained
from jaxclip.towers.towers import Towers, make_preprocess, make_towers
from jaxclip.training.recipe import abstract_batch, make_recipe, step_model_flops

GRANULE = 1024  # the batch that --max_batch finds is a multiple of this if config.batch_size is larger
MAX_PLANS, MIN_GAIN = 6, 0.03
"""Limits of the search for the largest batch: the number of programs, and the relative gain below which it stops."""
LARGEST = 20  # operations that a plan keeps
NO_TILES = "Couldn't find output tile sizes"  # in XLA's error if it has no tiles of Triton's for a product
WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}  # all products by cuBLAS


@dataclass(frozen=True)
class Plan:
    """One training step on one topology and mesh; bytes and FLOPs are per device and step.

    `jaxclip/planning/README.md` says how each is counted. If the compiler for TPUs refuses the program, because it does
    not fit into memory, only its memory and the model FLOPs are known; the other figures are then None or empty.

    Attributes:
      topology: the topology, such as "v5e:16x16".
      devices: number of devices, in all slices.
      slices: number of TPU slices.
      mesh: sizes of the axes data, fsdp and tensor.
      batch_size: pairs in the global batch.
      parameters: bytes of the parameters.
      optimizer: bytes of the optimizer state.
      batch: bytes of the batch; prefetched batches and pictures that the device has yet to resize are not counted.
      temporaries: all other bytes: activations, gradients, buffers, the program, the parameters' moving average.
      memory: bytes of the device's memory that a run can use.
      flops: FLOPs of the program's matrix products and convolutions.
      model_flops: FLOPs of the same products without recomputation and the optimizer (`recipe.step_model_flops`).
      traffic: bytes read from and written to memory.
      sent: collective -> bytes sent to other devices.
      between: collective -> those of the bytes sent that leave the slice (TPUs) or the machine (GPUs).
      seconds: the step's time if only "compute", "memory" or "network" limited it.
      exposed: the seconds of network during which the program does nothing else.
      mfu: time of `model_flops` at the device's peak, as a share of `step_seconds`: the MFU that the step can reach.
      pairs_per_second: pairs of all devices per second of `step_seconds`.
      operations: the operations that move the most bytes.
      settings: the settings of a run on these devices (see `compiler.report`).
    """

    topology: str
    devices: int
    slices: int
    mesh: tuple[int, int, int]
    batch_size: int
    parameters: float
    optimizer: float
    batch: float
    temporaries: float
    memory: float
    model_flops: float
    flops: float | None = None
    traffic: float | None = None
    sent: dict[str, float] = field(default_factory=dict)
    between: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    exposed: float | None = None
    mfu: float | None = None
    pairs_per_second: float | None = None
    operations: tuple[Operation, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def needed(self) -> float:
        """Bytes of memory that the step needs on one device."""
        return self.parameters + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    @property
    def step_seconds(self) -> float | None:
        """The roofline: the longest of the three times, as if the other two overlapped with it; None if unknown."""
        return max(self.seconds.values(), default=None)

    @property
    def bound(self) -> str | None:
        """What limits the step: "compute", "memory" or "network"; None if it is unknown."""
        return max(self.seconds, key=self.seconds.__getitem__, default=None)


@dataclass(frozen=True)
class Vocabulary:
    """Stands in for a tokenizer that is not trained yet: has the two properties on which the towers depend."""

    size: int
    eos_token_id: int = 0

    def __len__(self) -> int:
        return self.size


def check(config: Config, topology: str) -> None:
    """Raises the UserErrors of `plan` for a wrong topology, mesh or batch, without compiling anything."""
    opened = _open(config, topology)
    abstract_batch(config, _towers(config, opened))


def plan(config: Config, topology: str) -> Plan:
    """Returns the plan of the configured training step on a topology.

    Raises:
      UserError: the mesh does not divide the devices or the batch, or for the reasons given in `open_topology`.
    """
    opened = _open(config, topology)
    with compiler.compiling_for(opened.backend, opened.devices):
        towers = _towers(config, opened)
        batch = abstract_batch(config, towers)
        recipe = make_recipe(config, towers, _steps(config))
        with jax.set_mesh(towers.mesh):
            traced = jax.jit(recipe.step, donate_argnums=0).trace(recipe.state, batch)
            lowered = traced.lower(lowering_platforms=(opened.platform,))
        options, settings = {**(compiler.towers() or {}), **opened.options}, tuple(compiler.report())
    parameters, optimizer, batch_bytes = (_bytes(part) for part in (recipe.state.params, recipe.state.optimizer, batch))
    count = len(opened.devices)
    found = Plan(
        topology=topology,
        devices=count,
        slices=opened.slices,
        mesh=tuple(towers.mesh.shape.values()),
        batch_size=config.batch_size,
        parameters=parameters,
        optimizer=optimizer,
        batch=batch_bytes,
        temporaries=0.0,
        memory=opened.memory,
        model_flops=step_model_flops(config, towers) / count,
        settings=settings,
    )
    try:
        compiled, cublas = _compile(lowered, options)
    except jax.errors.JaxRuntimeError as error:
        temporaries = refused_temporaries(str(error), found.needed)
        if temporaries is None:
            raise
        return replace(found, temporaries=temporaries)
    sizes = compiled.memory_analysis()
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    needed = arguments + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    try:
        cost = program_cost(compiled.as_text(), list(towers.mesh.devices.flat), opened.chip)
    except ValueError as error:
        raise UserError(f"the program that was compiled for {topology} cannot be read: {error}") from error
    seconds = {"compute": cost.compute, "memory": cost.memory, "network": cost.network}
    step_seconds = max(seconds.values())
    return replace(
        found,
        temporaries=needed - found.needed,
        flops=sum(cost.flops.values()),
        traffic=cost.traffic,
        sent=cost.sent,
        between={kind: size for kind, size in cost.between.items() if size},
        seconds=seconds,
        exposed=cost.exposed,
        mfu=found.model_flops / opened.chip.peak(config.model.dtype) / step_seconds,
        pairs_per_second=config.batch_size / step_seconds,
        operations=tuple(cost.operations[:LARGEST]),
        settings=settings + (("all products are cuBLAS's: XLA has no Triton tiles for one of them",) if cublas else ()),
    )


def _compile(lowered: jax.stages.Lowered, options: Mapping) -> tuple[jax.stages.Compiled, bool]:
    """Returns the compiled program, and whether it is without Triton's products, for one of which XLA has no tiles.

    On a real GPU XLA chooses tiles by timing them. Without one it does not find any for attention by XLA.
    """
    try:
        return lowered.compile(compiler_options=options), False
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
    return lowered.compile(compiler_options={**options, **WITHOUT_TRITON}), True


def refused_temporaries(error: str, others: float) -> float | None:
    """Returns the bytes of temporaries that XLA's error names as too many, or None if it is another error.

    `others` is the number of all other bytes, which the error may include.
    """
    total = re.search(r"memory space hbm\. Used ([\d.]+)([KMGT]) of", error)
    match = total or re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds", error)
    if match is None:
        return None
    size = float(match[1]) * 1024 ** " KMGT".index(match[2])
    return size - others if total else size


def largest_batch(config: Config, topology: str, *, say: Callable[[str], None]) -> Plan:
    """Returns the plan of the largest global batch that fits, out of at most 6 batches that it compiles.

    Memory is nearly linear in the batch: the line through two plans predicts the largest batch, and each further plan
    corrects the prediction.

    Raises:
      UserError: none of these batches fits.
    """
    multiple = math.lcm(
        meshes.batch_multiple(_towers(config, _open(config, topology)).mesh), config.loss.microbatch or 1
    )
    granule = math.lcm(multiple, GRANULE) if config.batch_size > GRANULE else multiple
    plans: dict[int, Plan] = {}

    def compile_plan(batch: int) -> None:
        batch = max(granule, batch // granule * granule)
        if batch not in plans:
            say(f"compiling a batch of {batch:,} for {topology}")
            tried = plans[batch] = plan(replace(config, batch_size=batch), topology)
            say(f"needs {tried.needed / 2**30:,.2f} of {tried.memory / 2**30:,.2f} GiB")

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
            "set config.model.remat=full, or a smaller config.loss.microbatch, which need less memory"
        )
    return max(fitting, key=lambda candidate: candidate.batch_size)


def _open(config: Config, topology: str) -> Topology:
    return open_topology(topology, max(1, config.mesh.slices))


def _towers(config: Config, topology: Topology) -> Towers:
    """Returns the towers; GPUs, whose topology has all machines, leave out `mesh.slices`."""
    config = replace(config, mesh=replace(config.mesh, slices=0)) if topology.chip.gpu else config
    devices = topology.devices
    if config.model.init_from:
        pretrained = open_pretrained(config)
        return make_towers(config, pretrained.preprocess, pretrained.tokenizer, pretrained.config, devices)
    folder = config.data.tokenizer
    vocabulary = text.load_tokenizer(Path(folder).expanduser()) if folder else Vocabulary(config.data.vocab_size)
    return make_towers(config, make_preprocess(config), vocabulary, devices=devices)


def _steps(config: Config) -> int:
    """Returns the number of steps for the schedule; 1000 for runs in epochs, because the plan does not depend on it."""
    return config.steps or 1000


def _bytes(tree: Any) -> float:
    """Returns the number of bytes of a tree's arrays on one device."""
    return float(sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    ))  # fmt: skip
