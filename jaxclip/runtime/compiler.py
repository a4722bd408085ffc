"""XLA options and special implementations of operations, in one table by back end and processor."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

Option = str | bool | int
Options = dict[str, Option]

YNNPACK_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
"""Name of the option that lists the operations XLA delegates to YNNPACK, a library of CPU kernels."""
ZEN_5 = 26
"""CPU family of AMD's Zen 5 in /proc/cpuinfo; older AMD processors have lower numbers."""


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
    """One optimisation: XLA options or a special implementation that save time or memory on a back end.

    Attributes:
      name: name of the row, unique in TABLE.
      target: the programs that are compiled with the options ("towers" or "ranks"), or the operation that has a special
        form: a function of `models/cpu.py`, or "unroll" for transformers with unrolled instead of scanned layers.
      time_ratio: time with the optimisation / time without it; rows with a ratio of 1 save memory.
      measured: what was measured, with the preset of the towers, the processor and what it was compared with if noted.
      backend: "cpu", "gpu" or "tpu".
      processors: whether the row applies to CPUs of this vendor and family.
      dtype: dtype of the first operand for which the special form is used; None for all.
      options: options for XLA; empty if the row describes a special form of an operation.
    """

    name: str
    target: str
    time_ratio: float
    measured: str
    backend: str = "cpu"
    processors: Callable[[str, int], bool] = _any_processor
    dtype: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


TABLE = (
    Tuning(
        name="memory scheduler",  # orders operations to free memory early instead of to keep more threads busy
        target="towers",
        time_ratio=1.0,
        measured="step of tiny, float32, AMD before Zen 5; temporaries of vit_b_32's step: 3.0 GB instead of 3.7",
        options={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    ),
    Tuning(
        name="no YNNPACK",
        target="towers",
        time_ratio=0.84,
        measured="step of tiny, float32, AMD before Zen 5, against XLA's defaults; bfloat16 0.73",
        processors=_amd_before_zen_5,
        options={YNNPACK_LIBRARY: ""},
    ),
    Tuning(
        # Convolutions are left out, because YNNPACK's are slower than XLA's own, and with them sums: a fusion that
        # starts at the sum of a layer norm would include the convolution before it.
        name="YNNPACK for products",
        target="towers",
        time_ratio=0.83,
        measured="step of laptop, float32, Intel Sapphire Rapids, sums included, against no YNNPACK",
        processors=_not_amd_before_zen_5,
        options={YNNPACK_LIBRARY: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    ),
    Tuning(
        name="wide vectors",  # 512 bits, as in AVX-512; XLA's default is 256
        target="towers",
        time_ratio=0.93,
        measured="step of vit_b_32, Intel Sapphire Rapids; no gain on Zen 5",
        processors=_intel,
        options={"xla_cpu_prefer_vector_width": 512},
    ),
    Tuning(
        name="older emitters",  # they generate equally fast code; JAX 0.12 no longer has them
        target="ranks",
        time_ratio=1.0,
        measured="ranks; compilation takes 80 MB less",
        options={"xla_cpu_use_fusion_emitters": False},
    ),
    Tuning(
        name="wide vectors in ranks",
        target="ranks",
        time_ratio=0.80,
        measured="lists of the best 100, AMD Zen 5",
        options={"xla_cpu_prefer_vector_width": 512},
    ),
    Tuning(
        name="unrolled layers",
        target="unroll",
        time_ratio=0.83,
        measured="step of tiny, float32, AMD before Zen 5; bfloat16 0.86",
    ),
    Tuning(
        name="matrices of rows",
        target="contract",
        time_ratio=0.94,
        measured="step of tiny, float32, AMD before Zen 5; on Zen 5 tiny 0.91, laptop 0.86",
        dtype="float32",
    ),
    Tuning(
        name="bfloat16 products into float32",
        target="contract",
        time_ratio=0.40,
        measured="step of vit_b_32, bfloat16, Intel Sapphire Rapids with AMX; tiny on AMD before Zen 5: 0.96",
        dtype="bfloat16",
    ),
    Tuning(
        name="bias gradient as a product",
        target="add_bias",
        time_ratio=0.86,
        measured="step of tiny, bfloat16, AMD before Zen 5",
        dtype="bfloat16",
    ),
)

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Sets the platform ("cpu", "gpu", "tpu") that programs traced in the context are for; this machine may lack it."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def backend() -> str:
    """Returns the back end that programs are traced for: set by `compiling_for`, else JAX's default."""
    return _platform.get() or jax.default_backend()


def on_cpu() -> bool:
    """Returns whether programs are traced for CPUs."""
    return backend() == "cpu"


def has_form(operation: str, dtype: jnp.dtype | None = None) -> bool:
    """Returns whether TABLE has a special form of an operation for this back end, processor and operand dtype."""
    return any(row.dtype is None or row.dtype == dtype for row in _rows(operation) if not row.options)


def towers() -> Options | None:
    """Returns the compiler options for programs that run towers; None for XLA's defaults."""
    return _options("towers")


def ranks() -> Options | None:
    """Returns the compiler options for the rank kernel; None for XLA's defaults."""
    return _options("ranks")


def _rows(target: str) -> Iterator[Tuning]:
    """Yields the rows of TABLE for the target that apply to the back end and to this machine's processor."""
    current = backend()
    for row in TABLE:
        if (
            row.target == target
            and row.backend == current
            and (current != "cpu" or row.processors(*_vendor_and_family()))
        ):
            yield row


def _options(target: str) -> Options | None:
    """Returns the merged options of the target's rows, leaving out rows that this version of XLA does not support."""
    merged: Options = {}
    for row in _rows(target):
        if all(is_known(name, value) for name, value in row.options.items()):
            merged |= row.options
    return merged or None


@cache
def is_known(name: str, value: Option) -> bool:
    """Returns whether this version of XLA supports the option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


def release_memory() -> None:
    """Gives free heap memory back to the system, of which compilation can leave hundreds of MB.

    It does nothing if programs run on accelerators, or without Linux and glibc.
    """
    if on_cpu() and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def processor_line(*names: str) -> str:
    """Returns the first line of /proc/cpuinfo that begins with one of the names, given in lower case; else ""."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ""
    with cpuinfo.open() as file:
        return next((line for line in file if line.lower().startswith(names)), "")


@cache
def _vendor_and_family() -> tuple[str, int]:
    """Returns the processor's vendor and family from /proc/cpuinfo; "" and 0 if they are unknown."""
    vendor, family = (processor_line(name).partition(":")[2].strip() for name in ("vendor_id", "cpu family"))
    return vendor, int(family or 0)
