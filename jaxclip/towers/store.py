"""The embeddings that one checkpoint gave to pictures and captions, kept on disk by content."""

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
    """Returns what stands for some content in a store."""
    return hashlib.blake2b(content, digest_size=_KEY_BYTES).digest()


class EmbeddingStore:
    """The vectors that one checkpoint gave to contents (pictures, captions): an append-only file, memory-mapped.

    A row is a checksum, the content's key and its vector. The checksum covers the other two and the checkpoint's
    fingerprint, so that a row that was cut off, damaged or written by other towers is none: it is left out when the
    file is opened, and embedded again. Whatever interrupts the writing costs the rows that were not written yet.

    It is a context manager that keeps other processes out of its folder while it is open.

    Attributes:
      path: of the file.
      dimension: D, of the vectors.
      dropped: how many bytes of rows were no rows of this store when it was opened.
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
            self._say(f"another process embeds into {self.path.parent}: waiting for it")
            fcntl.flock(self._folder, fcntl.LOCK_EX)
        self._keep_whole_rows()
        self._file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        os.close(self._folder)

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """Returns the positions of keys that have no vector yet, each key once, ascending."""
        first = {key: position for position, key in reversed(list(enumerate(keys))) if key not in self._rows}
        return np.sort(np.fromiter(first.values(), np.int64, len(first)))

    def append(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "n D"]) -> None:
        """Adds the vectors of new keys."""
        rows = np.zeros(len(keys), self._row)
        rows["vector"] = vectors
        for row, key in zip(rows, keys, strict=True):
            row["key"] = np.void(key)
            row["checksum"] = zlib.crc32(row.tobytes()[4:], self._seed)
        self._file.write(rows.tobytes())
        self._file.flush()
        self._rows |= {key: len(self._rows) + new for new, key in enumerate(keys)}

    def vectors(self, keys: Sequence[bytes]) -> Float[np.ndarray, "G D"]:
        """Returns the vectors of these keys in this order; KeyError where one has none."""
        rows = np.fromiter((self._rows[key] for key in keys), np.int64, len(keys))
        return self._map()["vector"][rows]

    def _map(self) -> np.ndarray:
        count = self.path.stat().st_size // self._row.itemsize
        return np.memmap(self.path, self._row, "r", shape=(count,)) if count else np.zeros(0, self._row)

    def _keep_whole_rows(self) -> None:
        if not self.path.exists():
            return
        rows, size = self._map(), self._row.itemsize
        whole = np.zeros(len(rows), bool)
        for start in range(0, len(rows), _CHECKED_AT_ONCE):
            block = rows[start : start + _CHECKED_AT_ONCE]
            raw = memoryview(block.tobytes())
            for row, checksum in enumerate(block["checksum"].tolist()):
                whole[start + row] = zlib.crc32(raw[row * size + 4 : (row + 1) * size], self._seed) == checksum
        kept = rows if whole.all() else rows[whole]
        self.dropped = self.path.stat().st_size - kept.nbytes
        self._rows = {key.tobytes(): row for row, key in enumerate(kept["key"])}
        if self.dropped or len(self._rows) < len(kept):
            # A server may still have the old file mapped: it is replaced, never changed.
            self._say(f"{self.path}: {self.dropped:,} bytes are damaged or of other towers; embedding those anew")
            kept = kept[list(self._rows.values())]
            with files.atomically(self.path) as temporary:
                kept.tofile(temporary)
            self._rows = {key.tobytes(): row for row, key in enumerate(kept["key"])}
