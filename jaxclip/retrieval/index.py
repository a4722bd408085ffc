"""Embeddings of a gallery: kept on disk by content, searched exactly on the devices."""

import fcntl
import os
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from jaxclip.errors import UserError

KEY_BYTES = 16
_CHECKED_AT_ONCE = 4096


class EmbeddingIndex:
    """The vectors that one encoder gave to pictures, by the pictures' content: an append-only file, memory-mapped.

    A row is a checksum, the picture's key and its vector. The checksum covers the other two and the encoder's
    fingerprint, so that a row that was cut off, damaged or written by another encoder is none: it is left out when the
    file is opened, and embedded again. Whatever interrupts the writing costs the rows that were not written yet.

    It is a context manager that keeps other processes out while it is open.

    Attributes:
      dropped: how many bytes of rows were no rows of this index when it was opened.
    """

    def __init__(self, path: Path, *, encoder: str, dimension: int, say: Callable[[str], None] = lambda line: None):
        self.path, self.dropped = path, 0
        self._seed = zlib.crc32(encoder.encode())
        self._row = np.dtype([("checksum", "<u4"), ("key", f"V{KEY_BYTES}"), ("vector", "<f4", (dimension,))])
        self._rows: dict[bytes, int] = {}
        self._say = say

    def __enter__(self) -> "EmbeddingIndex":
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
        """Adds the vectors of new keys; UserError where one is not finite."""
        if not np.isfinite(vectors).all():
            raise UserError("the towers give vectors that are not finite: take another checkpoint with --step")
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
            self._say(f"{self.path}: {self.dropped:,} bytes are damaged or of another encoder; embedding those anew")
            kept = kept[list(self._rows.values())]
            temporary = self.path.with_suffix(".tmp")
            kept.tofile(temporary)
            os.replace(temporary, self.path)
            self._rows = {key.tobytes(): row for row, key in enumerate(kept["key"])}


class NearestNeighbours:
    """Exact nearest neighbours by dot product: the gallery lies on the devices, split over all of them.

    Every query is compared with every vector in float32; there is nothing approximate to tune below ten million rows.

    Attributes:
      most: how many neighbours a search returns at most.
    """

    def __init__(self, vectors: Float[np.ndarray, "G D"], *, most: int, devices: Sequence[jax.Device] | None = None):
        devices = jax.devices() if devices is None else devices
        mesh = jax.make_mesh((len(devices),), ("gallery",), axis_types=(AxisType.Auto,), devices=devices)
        self._sharding = NamedSharding(mesh, PartitionSpec("gallery"))
        self.size, self.dimension = vectors.shape
        self.most = min(most, self.size)
        self._tile = -(-self.size // len(devices))
        self._gallery = self._place(vectors)  # (N * T, D) for N devices
        self._everything = self._place(np.ones(self.size, bool))  # (N * T,)

    def __call__(
        self, queries: Float[np.ndarray, "B D"], allowed: Bool[np.ndarray, "G"] | None = None
    ) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
        """Returns the scores and gallery rows of each query's nearest neighbours, best first.

        Equal scores come by ascending row. K is `most`, or the number of rows that `allowed` holds where that is less.
        Each number of queries is compiled once.
        """
        mask = self._everything if allowed is None else self._place(allowed)
        count = self.most if allowed is None else min(self.most, int(allowed.sum()))
        scores, rows = _nearest(queries, self._gallery, mask, devices=self._sharding.num_devices, k=self.most)
        return np.asarray(scores)[:, :count], np.asarray(rows)[:, :count]

    def vector(self, row: int) -> Float[np.ndarray, "D"]:
        """Returns one row of the gallery."""
        return np.asarray(_row(self._gallery, row))

    def _place(self, rows: np.ndarray) -> jax.Array:
        shape = (self._sharding.num_devices * self._tile, *rows.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start = index[0].start or 0
            block = rows[start : start + self._tile]
            return np.pad(block, [(0, self._tile - len(block))] + [(0, 0)] * (rows.ndim - 1))

        return jax.make_array_from_callback(shape, self._sharding, part)


@partial(jax.jit, static_argnames=("devices", "k"))
def _nearest(queries, gallery, allowed, *, devices, k):
    # Flat: a product with a third axis, one for each device, took fifty times as long on CPU.
    scores = lax.dot_general(
        queries,
        gallery,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )  # (B, N * T)
    scores = jnp.where(allowed, scores, -jnp.inf).reshape(len(queries), devices, -1)
    # Each device finds its own best, and only those travel.
    tile = scores.shape[-1]
    scores, rows = lax.top_k(scores, min(k, tile))  # (B, N, k)
    rows += tile * jnp.arange(devices, dtype=rows.dtype)[:, None]
    if devices > 1:
        scores, best = lax.top_k(scores.reshape(len(queries), -1), k)
        return scores, jnp.take_along_axis(rows.reshape(len(queries), -1), best, axis=1)
    return scores[:, 0], rows[:, 0]


@jax.jit
def _row(gallery, row):
    return gallery[row]
