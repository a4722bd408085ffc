"""Files and folders that are written whole or not at all, and fingerprints of JSON values."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write a file or a folder to, which then takes the place of `path` in one step.

    The temporary path is in the same folder and has a name of its own, so several processes may write the same file;
    the last one wins. If the block raises, `path` is left as it was and what was written is removed.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomically(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value atomically, indented, with a final newline."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def fingerprint(value: Any, digits: int = 12) -> str:
    """Returns hex digits that change with any part of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
