"""XLA options and special implementations of operations for the back end and processor that programs are traced for."""

import ctypes
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from jaxclip.runtime.tunings import EFFORT_LEVELS, LOSS_TILES, TABLE, VARIABLES, Option, Tuning

Options = dict[str, Option]

FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables in which users set XLA's flags; libtpu reads the second, other compilers the first."""
OFF = ("false", "0", "off", "disabled")

_platform: ContextVar[str | None] = ContextVar("platform", default=None)
_absent: ContextVar[tuple[jax.Device, ...]] = ContextVar("absent", default=())


@contextmanager
def compiling_for(platform: str, devices: Sequence[jax.Device] = ()) -> Iterator[None]:
    """Sets the platform ("cpu", "gpu", "tpu") that programs traced in the context are for; this machine may lack it.

    `devices`: the devices of a topology that programs are compiled for. Without devices of the platform, here or in a
    topology, rows of TABLE for several devices apply, and options are assumed to be known to the compiler.
    """
    tokens = _platform.set(platform), _absent.set(tuple(devices))
    try:
        yield
    finally:
        _platform.reset(tokens[0])
        _absent.reset(tokens[1])


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


def loss_tile() -> int:
    """Returns the default rows and columns of a tile of the tiled loss on this back end."""
    return LOSS_TILES.get(backend(), LOSS_TILES["cpu"])


def report() -> list[str]:
    """Returns lines that name the settings of the towers' programs, and the user's own settings that replace some.

    On CPUs only the latter are named. Variables are named if `startup.set_variables` or the user has set them.
    """
    settings = list(_settings())
    applied = [setting for setting, own, in_force in settings if in_force and not own]
    lines = [f"settings for {backend().upper()}s: {', '.join(applied)}"] if applied and not on_cpu() else []
    return lines + [f"your setting {' '.join(own)} replaces {setting}" for setting, own, _ in settings if own]


def _settings() -> Iterator[tuple[str, list[str], bool]]:
    """Yields each setting of the towers' programs, the user's settings that replace it, and whether it is in force."""
    for variable in VARIABLES if backend() == "gpu" else ():
        names = [name for name in (variable.name, *variable.replaced_by) if name in os.environ]
        in_force = os.environ.get(variable.name) == variable.value
        own = [f"{name}={os.environ[name]}" for name in names if not (in_force and name == variable.name)]
        yield f"{variable.name}={variable.value}", own, in_force
    for row in _rows("towers"):
        if row.options:
            options = " ".join(f"{name}={value}" for name, value in row.options.items())
            yield options, _own_settings(row), _are_known(row)


def _user_flags() -> dict[str, tuple[str, str]]:
    """Returns the flags that the user set for XLA: name -> (value, environment variable)."""
    flags = {}
    for variable in FLAG_VARIABLES:
        text = os.environ.get(variable, "").strip()
        if text and not text.startswith("-") and Path(text).is_file():  # XLA reads the flags from such a file
            text = Path(text).read_text()
        for word in shlex.split(text):
            name, equals, value = word.lstrip("-").partition("=")
            flags[name] = (value if equals else "true"), variable
    return flags


def _rows(target: str) -> Iterator[Tuning]:
    """Yields the rows of TABLE for the target that apply to the back end, its devices and this machine's processor."""
    current = backend()
    for row in TABLE:
        if (
            row.target == target
            and row.backend == current
            and (current != "cpu" or row.processors(*_vendor_and_family()))
            and (not row.several_devices or _device_count() > 1)
        ):
            yield row


def _options(target: str) -> Options | None:
    """Returns the merged options of the target's rows.

    Rows that this version of XLA does not support, or that the user's own settings replace, are left out.
    """
    merged: Options = {}
    for row in _rows(target):
        if not _own_settings(row) and _are_known(row):
            merged |= {name: _xla_value(name, value) for name, value in row.options.items()}
    return merged or None


def _own_settings(row: Tuning) -> list[str]:
    """Returns the user's settings that replace a row, as VARIABLE=VALUE or FLAG=VALUE of a variable."""
    flags = _user_flags()
    own = [f"{name}={os.environ[name]}" for name in row.variables if name in os.environ]
    for name, (value, variable) in flags.items():
        if name in row.options or (name in row.switches and value.lower() in OFF):
            own.append(f"{variable}=--{name}={value}")
    return own


def _are_known(row: Tuning) -> bool:
    return all(is_known(name, _xla_value(name, value)) for name, value in row.options.items())


def _xla_value(name: str, value: Option) -> Option:
    return EFFORT_LEVELS[value] if name == "optimization_level" else value


def local_device() -> jax.Device | None:
    """Returns a device of those that programs are compiled for; None if there is none, only the name of a platform."""
    if _absent.get():
        return _absent.get()[0]
    return jax.local_devices()[0] if backend() == jax.default_backend() else None


def _device_count() -> float:
    if _absent.get():
        return len(_absent.get())
    return jax.device_count() if backend() == jax.default_backend() else float("inf")


def is_known(name: str, value: Option) -> bool:
    """Returns whether the compiler of the back end that programs are traced for supports the option.

    True if that compiler cannot be asked, because neither this machine nor `compiling_for` has a device for it.
    """
    device = local_device()
    return device is None or _is_known(name, value, device)


@cache
def _is_known(name: str, value: Option, device: jax.Device) -> bool:
    with jax.set_mesh(Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))):  # not that of the caller
        program = jax.jit(lambda: 0, out_shardings=SingleDeviceSharding(device)).trace()
        if device.platform == jax.default_backend():
            lowered = program.lower()
        else:  # the device is part of a topology
            lowered = program.lower(lowering_platforms=("cuda" if device.platform == "gpu" else device.platform,))
    try:
        lowered.compile(compiler_options={name: value})
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
