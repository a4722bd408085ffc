"""What programs are made for: on CPUs they are written otherwise, and XLA is asked for options of its own."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import jax

Option = str | bool | int
Options = dict[str, Option]
TOWERS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""What is computed next is what lets go of memory, not what would give more threads something to do."""
YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
"""It has the products and the sums, not the convolutions, which take 1.4 to 7 times as long as XLA's there."""
NO_YNNPACK = dict.fromkeys(YNNPACK, "")
"""It has nothing, on processors before ZEN_5."""
ZEN_5 = 26
"""As Linux numbers the families of NO_YNNPACK's processors."""
WIDE = {"xla_cpu_prefer_vector_width": 512}
"""Vectors as wide as AVX-512 has them, not half as wide."""
EMITTERS = {"xla_cpu_use_fusion_emitters": False}
"""The older emitters, which JAX 0.12 has no more: their code is as fast, and compiling it takes 80 MB less."""

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """What is first traced inside is written for this platform ("cpu", "gpu", "tpu"), be it here or not."""
    before = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(before)


def on_cpu() -> bool:
    """Returns whether what is traced now is for CPUs: what `compiling_for` says, else JAX's default backend."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def towers() -> Options | None:
    """Returns the options of programs that run towers.

    In the order of TOWERS a step of vit_b_32 (32 pairs, float32) holds 3.0 GB beside its state where it held 3.7, and
    takes 0.96 of its time. Without YNNPACK a training step of the preset laptop takes 0.8 of the time on AMD's Zen 4,
    and 1.2 on Intel's Sapphire Rapids, as does one of vit_b_32 there; on Zen 5 the latter takes 1.1, and in bfloat16,
    which XLA's own products widen, 1.9. Wide vectors take 0.93 of it on Sapphire Rapids, and gain nothing on Zen 5.
    """
    vendor, family = _maker()
    library = NO_YNNPACK if vendor == "AuthenticAMD" and family < ZEN_5 else YNNPACK
    return _known(TOWERS, library, WIDE if vendor == "GenuineIntel" else {})


def ranks() -> Options | None:
    """Returns the options of the program that ranks: wide vectors take 0.8 of the time of lists of 100 on Zen 5."""
    return _known(EMITTERS, WIDE)


def options(wanted: Mapping[str, Option]) -> Options | None:
    """Returns options for `jax.jit`: `wanted` on CPUs if this version of XLA knows them, else None, its defaults."""
    known = on_cpu() and all(_is_known(*option) for option in wanted.items())
    return dict(wanted) if known and wanted else None


def _known(*parts: Mapping[str, Option]) -> Options | None:
    """Returns all of those parts that `options` returns."""
    return {name: value for part in parts for name, value in (options(part) or {}).items()} or None


def release_memory() -> None:
    """Hands free main memory back to the system on Linux with glibc: compiling a step of vit_b_32 leaves 0.7 GB."""
    if on_cpu() and sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def processor_line(*names: str) -> str:
    """Returns the first line of /proc/cpuinfo that begins with one of the names, in lower case; "" if there is none."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return ""
    with described.open() as file:
        return next((line for line in file if line.lower().startswith(names)), "")


@cache
def _maker() -> tuple[str, int]:
    """Returns who made the processor and its family, as Linux names them; "" and 0 where that is not known."""
    vendor, family = (processor_line(name).partition(":")[2].strip() for name in ("vendor_id", "cpu family"))
    return vendor, int(family or 0)


@cache
def _is_known(name: str, value: Option) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
