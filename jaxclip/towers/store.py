"""A file of the embeddings that one checkpoint gave to pictures and captions, looked up by content."""

import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxclip.runtime import files

_KEY_BYTES = 16
_CHECKED_AT_ONCE = 4096


def content_key(content: bytes) -> bytes:
    """Returns the content's hash (BLAKE2b, 128 bits), which is its key in a store."""
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


class EmbeddingStore:
    """The embeddings that one checkpoint gave to contents (pictures, captions), in an append-only, memory-mapped file.

    A row holds a checksum, the content's key and its vector. The checksum covers key, vector and `fingerprint`, which
    identifies the towers, so that it is wrong for a row that was cut off, damaged or written by other towers. Such rows
    are dropped when the file is opened, and their contents are embedded again. An interruption loses only the rows that
    were not written yet.

    The store is a context manager. While it is open, other processes that open a store in the same folder wait.

    Attributes:
      path: the file.
      dimension: D, the dimension of the vectors.
      dropped: number of bytes that were dropped when the file was opened.
    """

    def __init__(self, path: Path, *, fingerprint: str, dimension: int, say: Callable[[str], None] = lambda line: None):
        self.path, self.dimension, self.dropped = path, dimension, 0
        self._seed = zlib.crc32(fingerprint.encode())
        self._row = np.dtype([("checksum", "<u4"), ("key", f"V{_KEY_BYTES}"), ("vector", "<f4", (dimension,))])
        self._rows: dict[bytes, int] = {}
        self._say = say

    def __enter__(self) -> "EmbeddingStore":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say(f"another process is writing embeddings to {self.path.parent}: waiting for it to finish")
            fcntl.flock(self._folder, fcntl.LOCK_EX)
        self._drop_invalid_rows()
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        os.close(self._folder)

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the positions of the keys that have no vector yet, ascending; equal keys appear once."""
        first = {key: position for position, key in reversed(list(enumerate(keys))) if key not in self._rows}
        return np.sort(np.fromiter(first.values(), np.int64, len(first)))

    def append(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "n D"]) -> None:
        """Appends the vectors of keys that the store does not have yet."""
        rows = np.zeros(len(keys), self._row)
        rows["vector"] = vectors
        for row, key in zip(rows, keys, strict=True):
            row["key"] = np.void(key)
            row["checksum"] = zlib.crc32(row.tobytes()[4:], self._seed)
        self._file.write(rows.tobytes())
        self._file.flush()
        self._rows |= {key: len(self._rows) + new for new, key in enumerate(keys)}

    def vectors(self, keys: Sequence[bytes]) -> Float[np.ndarray, "G D"]:
        """Returns the vectors of the keys, in their order; KeyError if one has no vector."""
        rows = np.fromiter((self._rows[key] for key in keys), np.int64, len(keys))
        return self._map()["vector"][rows]

    def _map(self) -> np.ndarray:
        count = self.path.stat().st_size // self._row.itemsize
        return np.memmap(self.path, self._row, "r", shape=(count,)) if count else np.zeros(0, self._row)

    def _drop_invalid_rows(self) -> None:
        if not self.path.exists():
            return
        rows, size = self._map(), self._row.itemsize
        valid = np.zeros(len(rows), bool)
        for start in range(0, len(rows), _CHECKED_AT_ONCE):
            block = rows[start : start + _CHECKED_AT_ONCE]
            raw = memoryview(block.tobytes())
            for row, checksum in enumerate(block["checksum"].tolist()):
                valid[start + row] = zlib.crc32(raw[row * size + 4 : (row + 1) * size], self._seed) == checksum
        rows = rows if valid.all() else rows[valid]
        self.dropped = self.path.stat().st_size - rows.nbytes
        self._rows = {key.tobytes(): row for row, key in enumerate(rows["key"])}
        if self.dropped or len(self._rows) < len(rows):
            # The file is replaced rather than changed, because a server may still have the old one mapped.
            self._say(f"{self.path}: dropped {self.dropped:,} bytes, damaged or of other towers; embedding again")
            rows = rows[list(self._rows.values())]
            with files.atomically(self.path) as temporary:
                rows.tofile(temporary)
            self._rows = {key.tobytes(): row for row, key in enumerate(rows["key"])}
