"""Atomic writes of files and folders, and fingerprints of JSON values."""

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
    """Yields a temporary path for a file or folder that is moved to `path` when the block ends.

    A file replaces an existing file; a folder can replace an existing folder only if that is empty. Every temporary
    path is unique, so several processes may write the same file; the last one wins. If the block raises, `path` is
    unchanged and the temporary file or folder is removed.
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
    """Returns the first `digits` hex digits of a hash (SHA-256) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
