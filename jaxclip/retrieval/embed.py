"""All pictures or captions of a split into embeddings, kept on disk part by part."""

import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

PART = 16  # batches of a stored part


def embed(encode: Callable[[Array], Array], batches: Iterable[Array], count: int) -> np.ndarray:
    """Returns the embeddings of the first `count` rows of the batches, (count, D) float32.

    The batches have one shape, so that `encode` is compiled once; rows beyond `count` fill up the last one and are cut
    off. One batch is computed while the one before is copied back.
    """
    blocks: list[np.ndarray] = []
    running = None
    for batch in batches:
        started = encode(batch)
        if running is not None:
            blocks.append(np.asarray(running))
        running = started
    if running is not None:
        blocks.append(np.asarray(running))
    rows = np.concatenate(blocks)
    if len(rows) < count:
        raise ValueError(f"{count} rows expected, the batches hold {len(rows)}")
    return rows[:count]


def padded_blocks(rows: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Yields the rows in blocks of exactly `size`; the last one is filled up with its last row."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])


def embed_stored(
    folder: Path, encode: Callable[[Array], Array], batches: Callable[[int], Iterable[Array]], count: int, size: int
) -> np.ndarray:
    """Returns what `embed` returns, reading from the folder what an earlier call has left there and adding the rest.

    A part is written as soon as it is there, whole or not at all, so that what is interrupted goes on where it was.
    Where several processes embed together the first one keeps the files and tells the others.

    Args:
      folder: of these embeddings alone: its name has to change with whatever they depend on.
      batches: batches(n) yields the batches from the n-th on, of `size` rows each over all processes.
    """
    first = jax.process_index() == 0
    parts = _stored(folder) if first else []
    known = len(parts)
    if jax.process_count() > 1:
        known, width = multihost_utils.broadcast_one_to_all(np.asarray([known, parts[0].shape[1] if parts else 0]))
        rows = np.concatenate(parts) if parts else np.zeros((_rows(known, size, count), width), np.float32)
        parts = [np.asarray(multihost_utils.broadcast_one_to_all(rows))] if known else []
    remaining = iter(batches(int(known) * PART)) if _rows(known, size, count) < count else iter(())
    for number in range(int(known), -(-count // (PART * size))):
        rows = embed(encode, islice(remaining, PART), _rows(number + 1, size, count) - _rows(number, size, count))
        parts.append(rows)
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{number:06d}.tmp"
            with temporary.open("wb") as file:
                np.save(file, rows)
            os.replace(temporary, folder / f"{number:06d}.npy")
    return np.concatenate(parts)


def _rows(parts, size: int, count: int) -> int:
    return min(int(parts) * PART * size, count)


def _stored(folder: Path) -> list[np.ndarray]:
    """Returns the parts that are there, from the first on without a gap."""
    parts = []
    while (path := folder / f"{len(parts):06d}.npy").exists():
        parts.append(np.load(path))
    return parts
