"""What a process sets before it works: memory, the cache of compiled programs, platforms, quiet imports."""

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

from jaxclip.runtime import compiler, folders

COMPILED_BYTES = 2 * 2**30


# A full, read-only or forbidden disk may show at any write.
SURROUNDINGS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")


MALLOC = {"hugetlb": 1, "mmap_threshold": 10**11, "trim_threshold": 10**11, "top_pad": 2**28, "arena_max": 1}


def reuse_memory() -> None:
    """Starts the process again, once, with a glibc that reuses large blocks; does nothing beside accelerators.

    XLA's CPU backend allocates its temporaries anew in each step, and by default glibc returns such blocks to the
    kernel, which clears them page by page: that took a fifth to a quarter of a training step here. Blocks of over 64
    MiB stay only in the first arena, so it has to be the only one. The settings are read when a process starts, so it
    has to begin again; GLIBC_TUNABLES set by the user stands.
    """
    accelerators = any(glob.glob(pattern) for pattern in ACCELERATORS)
    if sys.platform != "linux" or accelerators or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled() -> None:
    """Has JAX keep compiled programs under `folders.cache()`, the latest 2 GiB; JAX_COMPILATION_CACHE_DIR stands.

    For CPUs they are machine code that JAX would load on a CPU without these instructions too: each kind of CPU has a
    folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    cpu = compiler.processor_line("flags", "features") or platform.processor() or platform.machine()
    kind = hashlib.sha256(cpu.encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(folders.cache() / "compiled" / kind))
    jax.config.update("jax_compilation_cache_max_size", COMPILED_BYTES)


def leave_absent_tpus_alone() -> None:
    """Has JAX use CPUs where libtpu is installed, as `plan` needs it, but no TPU is there and no GPU either.

    JAX would load libtpu to look for TPUs, and once loaded it crashes the profiler. JAX_PLATFORMS set by the user
    stands.
    """
    absent = not any(glob.glob(pattern) for pattern in ACCELERATORS)
    if absent and "JAX_PLATFORMS" not in os.environ and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", "cpu")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries write to the standard error stream itself while they are loaded.

    TensorFlow tells there, past every setting, that it found no CUDA. Exceptions come through.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
