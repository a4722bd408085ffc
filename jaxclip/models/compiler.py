"""What XLA is asked for where it compiles for CPUs, as `jax.jit`'s compiler_options; other devices get its defaults."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jax

TOWERS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Nothing is handed to YNNPACK, on AMD's processors (see `towers`)."""
RANKS = {"xla_cpu_use_fusion_emitters": False}
"""The older emitters, which JAX 0.12 has no more: their code is as fast, and compiling it takes 80 MB less."""


def towers() -> dict[str, str | bool] | None:
    """Returns the options of programs that run towers.

    Without YNNPACK a training step of the preset laptop takes 0.8 of the time on AMD's Zen 4, and 1.2 on Intel's
    Sapphire Rapids, as does one of vit_b_32 there.
    """
    return options(TOWERS) if _vendor() == "AuthenticAMD" else None


def options(wanted: Mapping[str, str | bool]) -> dict[str, str | bool] | None:
    """Returns the options for the default backend: `wanted` on a CPU if this version of XLA knows them, else None."""
    known = jax.default_backend() == "cpu" and all(_is_known(*option) for option in wanted.items())
    return dict(wanted) if known else None


def processor_line(*names: str) -> str:
    """Returns the first line of /proc/cpuinfo that begins with one of the names, in lower case; "" if there is none."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return ""
    with described.open() as file:
        return next((line for line in file if line.lower().startswith(names)), "")


@cache
def _vendor() -> str:
    """Returns who made the processor, as Linux names them; "" where that is not known."""
    return processor_line("vendor_id").partition(":")[2].strip()


@cache
def _is_known(name: str, value: str | bool) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
