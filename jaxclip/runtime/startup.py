"""Settings of the process at start-up: memory, compilation cache, platforms, quiet imports."""

import errno
import glob
import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxclip.runtime import compiler, folders, tunings

CACHE_BYTES = 2 * 2**30  # size limit of the cache of compiled programs
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a full, read-only or forbidden disk, which any write may raise."""
GPUS = "/dev/nvidia[0-9]*"
ACCELERATORS = (GPUS, "/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of GPUs and TPUs."""
MALLOC = {"hugetlb": 1, "mmap_threshold": 10**11, "trim_threshold": 10**11, "top_pad": 2**28, "arena_max": 1}
"""Settings of glibc's malloc; `reuse_memory` gives the reasons."""


def reuse_memory() -> None:
    """Restarts the process once with glibc settings that reuse large blocks; only on Linux, without a GPU or TPU.

    XLA's CPU back end allocates its temporaries in every step. By default glibc returns such blocks to the kernel,
    which clears them page by page before it hands them out again. Only the first arena keeps blocks of over 64 MiB, so
    the process gets no other. glibc reads these settings when a process starts, hence the restart. GLIBC_TUNABLES set
    by the user is not changed.
    """
    accelerators = any(glob.glob(pattern) for pattern in ACCELERATORS)
    if sys.platform != "linux" or accelerators or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def cache_compiled_programs() -> None:
    """Makes JAX cache compiled programs under `folders.cache()`, up to 2 GiB of the most recently used ones.

    A JAX_COMPILATION_CACHE_DIR set by the user is not changed. Each kind of CPU has its own folder of up to 2 GiB,
    because JAX would also load a program with instructions that this CPU lacks.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    cpu = compiler.processor_line("flags", "features") or platform.processor() or platform.machine()
    kind = hashlib.sha256(cpu.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folders.cache() / "compiled" / kind))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)


def avoid_loading_libtpu() -> None:
    """Makes JAX use only CPUs if libtpu is installed (for `plan`) but the machine has neither a TPU nor a GPU.

    Otherwise JAX loads libtpu to look for TPUs, and a loaded libtpu crashes the profiler. JAX_PLATFORMS set by the user
    is not changed.
    """
    absent = not any(glob.glob(pattern) for pattern in ACCELERATORS)
    if absent and "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", "cpu")


def set_variables() -> None:
    """Sets the environment variables of `tunings.VARIABLES` on a machine with GPUs that JAX may use.

    Call this before JAX starts its back ends, which read the variables. A variable that the user has set, or replaced
    by another one, is not changed.
    """
    platforms = (jax.config.jax_platforms or "cuda").split(",")
    if not glob.glob(GPUS) or not {"cuda", "gpu"} & set(platforms):
        return
    for variable in tunings.VARIABLES:
        own = {variable.name, *variable.replaced_by} & os.environ.keys()
        if not own and jax.__version_info__ < variable.before:
            os.environ[variable.name] = variable.value


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries write to file descriptor 2 while they are imported; exceptions are raised as usual.

    TensorFlow reports a missing CUDA there at any log level.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)
