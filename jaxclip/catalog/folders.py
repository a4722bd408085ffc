"""Where what may be kept between runs is kept."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def cache() -> Path:
    """Returns the folder of drawn catalogues, prepared datasets and compiled programs: $JAXCLIP_CACHE.

    It is ~/.cache/jaxclip where that is not set.
    """
    return Path(os.environ.get("JAXCLIP_CACHE") or Path.home() / ".cache" / "jaxclip").expanduser()


@contextlib.contextmanager
def alone_in(folder: Path, does: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder for one process of this machine: others wait, and `say` that another one `does` something there.

    A missing folder is made, and removed if nothing was put there. A process that is killed holds nothing.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process {does} in {folder}: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        os.close(handle)
