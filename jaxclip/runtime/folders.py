"""The cache folder, and a lock so that only one process fills a folder."""

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def cache() -> Path:
    """Returns the folder of drawn catalogues, prepared datasets, re-rankers' embeddings and compiled programs.

    It is $JAXCLIP_CACHE, or ~/.cache/jaxclip if that is not set.
    """
    return Path(os.environ.get("JAXCLIP_CACHE") or Path.home() / ".cache" / "jaxclip").expanduser()


def make_once(
    exists: Callable[[], bool], make: Callable[[], None], folder: Path, verb: str, say: Callable[[str], None]
) -> None:
    """Calls `make` unless its result `exists`; only one process of this machine at a time does so for a folder.

    The other processes wait and `say` so, with a `verb` such as "prepares" for what is done in the folder. A missing
    folder is created, and removed again if it is still empty afterwards. A killed process releases its lock.
    """
    if exists():
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process {verb} in {folder}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not exists():
            make()
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        os.close(handle)
