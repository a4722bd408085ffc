"""Settings that save time or memory, by back end and processor, each with its measurement or its source: data only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Option = str | bool | int

YNNPACK_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
"""Name of the option that lists the operations XLA delegates to YNNPACK, a library of CPU kernels."""
ZEN_5 = 26
"""CPU family of AMD's Zen 5 in /proc/cpuinfo; older AMD processors have lower numbers."""
LOSS_TILES = {"cpu": 1024, "gpu": 4096, "tpu": 2048}
"""Back end -> rows and columns of a tile of the tiled loss.

On CPUs a tile of 4 MiB fits into a core's cache, yet its products are large enough to be fast. The others move the
fewest bytes of main memory in compiled programs with bfloat16 products. For tiles of 1,024, 2,048 and 4,096, these are
28.1, 15.3 and 16.4 GB per chip for 1,048,576 x 512 on TPU v5e:16x16, and 10.6, 8.6 and 7.3 GB for 32,768 x 512 on
h200:8 (30 Nov 2026, libtpu 0.0.52, jax-cuda13-plugin 0.10.2).
"""
EFFORT_LEVELS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}
"""Values of the option optimization_level -> XLA's numbers, the only form that JAX before 0.11 takes."""


@dataclass(frozen=True)
class Measured:
    """What a setting saved in a measurement.

    Attributes:
      time_ratio: time with the setting / time without it; settings with a ratio of 1 save memory.
      what: what was measured, with the preset of the towers, the processor and what it was compared with if noted.
    """

    time_ratio: float
    what: str


@dataclass(frozen=True)
class Documented:
    """Why a setting that was not measured here is set: what a document says about it, and the document's address."""

    reason: str
    url: str


def _any_processor(vendor: str, family: int) -> bool:
    return True


def _intel(vendor: str, family: int) -> bool:
    return vendor == "GenuineIntel"


def _amd_before_zen_5(vendor: str, family: int) -> bool:
    return vendor == "AuthenticAMD" and family < ZEN_5


def _not_amd_before_zen_5(vendor: str, family: int) -> bool:
    return not _amd_before_zen_5(vendor, family)


@dataclass(frozen=True)
class Tuning:
    """XLA options for one program, or a special implementation of an operation, that are worth using on a back end.

    Attributes:
      name: name of the row, unique in TABLE.
      target: the programs that are compiled with the options ("towers" or "ranks"), or the operation that has a special
        form: a function of `models/cpu.py`, `models/gpu.py`, `ranking/cpu_selection.py` or `ranking/gpu_selection.py`,
        or "unroll" for transformers with unrolled instead of scanned layers.
      evidence: the measurement or the document that the row is based on.
      backend: "cpu", "gpu" or "tpu".
      processors: whether the row applies to CPUs of this vendor and family.
      several_devices: whether the row is only for programs on several devices.
      dtype: dtype of the first operand for which the special form is used; None for all.
      options: options for XLA; empty if the row describes a special form of an operation.
      switches: flags that the options switch on. If the user switched one of them off, the row is left out.
      variables: environment variables with which the user replaces the row.
    """

    name: str
    target: str
    evidence: Measured | Documented
    backend: str = "cpu"
    processors: Callable[[str, int], bool] = _any_processor
    several_devices: bool = False
    dtype: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    switches: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variable:
    """An environment variable for GPUs that is set before JAX starts its back ends, unless the user has set it.

    Attributes:
      name: the variable.
      value: its value.
      evidence: the document that the row is based on.
      replaced_by: other variables with which the user decides the same.
      before: the variable is set only for versions of JAX before this one.
    """

    name: str
    value: str
    evidence: Documented
    replaced_by: tuple[str, ...] = ()
    before: tuple[int, ...] = ()


TABLE = (
    Tuning(
        name="memory scheduler",  # orders operations to free memory early instead of to keep more threads busy
        target="towers",
        evidence=Measured(
            1.0, "step of tiny, float32, AMD before Zen 5; temporaries of vit_b_32's step: 3.0 GB instead of 3.7"
        ),
        options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    ),
    Tuning(
        name="no YNNPACK",
        target="towers",
        evidence=Measured(0.84, "step of tiny, float32, AMD before Zen 5, against XLA's defaults; bfloat16 0.73"),
        processors=_amd_before_zen_5,
        options={YNNPACK_LIBRARY: ""},
    ),
    Tuning(
        # Convolutions are left out, because YNNPACK's are slower than XLA's own, and with them sums: a fusion that
        # starts at the sum of a layer norm would include the convolution before it.
        name="YNNPACK for products",
        target="towers",
        evidence=Measured(0.83, "step of laptop, float32, Intel Sapphire Rapids, sums included, against no YNNPACK"),
        processors=_not_amd_before_zen_5,
        options={YNNPACK_LIBRARY: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    ),
    Tuning(
        name="wide vectors",  # 512 bits, as in AVX-512; XLA's default is 256
        target="towers",
        evidence=Measured(0.93, "step of vit_b_32, Intel Sapphire Rapids; no gain on Zen 5"),
        processors=_intel,
        options={"xla_cpu_prefer_vector_width": 512},
    ),
    Tuning(
        name="older emitters",  # they generate equally fast code; JAX 0.12 no longer has them
        target="ranks",
        evidence=Measured(1.0, "ranks; compilation takes 80 MB less"),
        options={"xla_cpu_use_fusion_emitters": False},
    ),
    Tuning(
        name="wide vectors in ranks",
        target="ranks",
        evidence=Measured(0.80, "lists of the best 100, AMD Zen 5"),
        options={"xla_cpu_prefer_vector_width": 512},
    ),
    Tuning(
        name="unrolled layers",
        target="unroll",
        evidence=Measured(0.83, "step of tiny, float32, AMD before Zen 5; bfloat16 0.86"),
    ),
    Tuning(
        name="unrolled layers on GPUs",  # a scan copies what it keeps for the backward pass into and out of stacks
        target="unroll",
        evidence=Measured(0.59, "memory traffic of vit_b_16's step, 512 pairs, H200, nothing recomputed, by its plan"),
        backend="gpu",
    ),
    Tuning(
        # The gradient of the hidden features is added up for a bias and read by two products.
        name="gradients written once",
        target="write_gradient_once",
        evidence=Measured(
            0.93, "memory traffic of two layers of vit_b_16's image tower, 512 pictures, H200, by its plan"
        ),
        backend="gpu",
    ),
    Tuning(
        name="matrices of rows",
        target="contract",
        evidence=Measured(0.94, "step of tiny, float32, AMD before Zen 5; on Zen 5 tiny 0.91, laptop 0.86"),
        dtype="float32",
    ),
    Tuning(
        name="bfloat16 products into float32",
        target="contract",
        evidence=Measured(
            0.40, "step of vit_b_32, bfloat16, Intel Sapphire Rapids with AMX; tiny on AMD before Zen 5: 0.96"
        ),
        dtype="bfloat16",
    ),
    Tuning(
        name="bias gradient as a product",
        target="sum_rows",
        evidence=Measured(0.86, "step of tiny, bfloat16, AMD before Zen 5"),
        dtype="bfloat16",
    ),
    Tuning(
        name="packed candidates",
        target="count_and_select",
        evidence=Measured(
            0.38, "ranks and the best 20 of 8,192 items in both directions, AMD before Zen 5; 0.79 without the best"
        ),
    ),
    Tuning(
        name="top k by groups",
        target="top_k",
        evidence=Documented(
            "XLA sorts whole lines for chlo.top_k, here several times as many scores as by groups",
            "https://github.com/openxla/xla/issues/25487",
        ),
        backend="gpu",
    ),
    Tuning(
        # In float32 XLA chooses what it stores of activations and norms; in bfloat16 a barrier keeps it from storing
        # float32 values.
        name="barrier before recomputation",
        target="recompute",
        evidence=Measured(
            0.91, "step of tiny, bfloat16, AMD before Zen 5, against norms that store float32 values; float32 unchanged"
        ),
    ),
    Tuning(
        name="one scatter of token gradients",
        target="sum_by_id",
        evidence=Measured(0.74, "gradient of 64 x 32 tokens, bfloat16, AMD before Zen 5; 0.1 ms of a step of tiny"),
    ),
    Tuning(
        # On a single device, which has no collectives, O1 would only lengthen compilation. Thresholds that combine
        # collectives are not set: O1 combines the pipelined ones itself, and of the 27 asynchronous collectives of a
        # step of vit_b_32 over mesh.fsdp=8, those of 64 and 128 MiB remove one.
        name="collectives overlap with computation",
        target="towers",
        evidence=Documented(
            "O1 turns on the latency hiding scheduler, pipelined collectives and double buffering of loops, which XLA "
            "leaves out by default because they lengthen compilation",
            "https://openxla.org/xla/effort_levels",
        ),
        backend="gpu",
        several_devices=True,
        options={"optimization_level": "O1"},
        switches=(
            "xla_gpu_enable_latency_hiding_scheduler",
            "xla_gpu_enable_pipelined_all_gather",
            "xla_gpu_enable_pipelined_all_reduce",
            "xla_gpu_enable_pipelined_reduce_scatter",
            "xla_gpu_pipeline_all_gather",  # the names from JAX 0.11 on
            "xla_gpu_pipeline_all_reduce",
            "xla_gpu_pipeline_reduce_scatter",
        ),
        variables=("JAX_OPTIMIZATION_LEVEL",),
    ),
    # TPUs have no row. libtpu 0.0.52 already has the latency hiding scheduler and asynchronous all-gathers on, which
    # https://openxla.org/xla/flags_guidance gives as defaults. The asynchronous all-reduces that it suggests for v5e
    # (xla_tpu_enable_async_collective_fusion_fuse_all_reduce) do not change the program, and with
    # xla_enable_async_all_reduce as well the all-reduces of data parallelism stay synchronous.
)

VARIABLES = (
    Variable(
        # NCCL, cuDNN and cuBLAS use the rest. JAX 0.10 to 0.12 reserve 75%. In later versions the reserve grows if no
        # fraction is set (docs.jax.dev/en/latest/gpu_memory_allocation.html).
        name="XLA_CLIENT_MEM_FRACTION",
        value="0.9",
        evidence=Documented(
            "JAX reserves 75% of a GPU's memory and cannot use more; NVIDIA typically sets 0.8 or 0.9",
            "https://github.com/NVIDIA/JAX-Toolbox/blob/main/docs/GPU_performance.md",
        ),
        # JAX refuses to start if the old name is set as well.
        replaced_by=(
            "XLA_PYTHON_CLIENT_MEM_FRACTION",
            "XLA_PYTHON_CLIENT_PREALLOCATE",
            "XLA_PYTHON_CLIENT_ALLOCATOR",
        ),
        before=(0, 13),
    ),
)
