"""All pictures or captions of a split into embeddings."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Array


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
