"""Embeds batches of pictures or captions, optionally saving the embeddings in a store as they are computed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxclip.towers.store import EmbeddingStore


def embed(encode: Callable[[Array], Array], batches: Iterable[Array], count: int) -> np.ndarray:
    """Returns what `encode` gives for the first `count` rows of the batches, such as embeddings (count, D).

    The batches must have the same shape, so that `encode` is compiled once; rows beyond `count` are padding of the last
    batch and are dropped. Each batch is computed while the results of the previous one are copied to the host.

    Raises:
      ValueError: the batches have fewer rows than `count`.
    """
    rows = np.concatenate(list(_encoded(encode, batches)))
    if len(rows) < count:
        raise ValueError(f"{count} rows expected, the batches hold {len(rows)}")
    return rows[:count]


def _encoded(encode: Callable[[Array], Array], batches: Iterable[Array]) -> Iterator[np.ndarray]:
    """Yields what `encode` gives for each batch, after it has started the next batch."""
    running = None
    for batch in batches:
        started = encode(batch)
        if running is not None:
            yield np.asarray(running)
        running = started
    if running is not None:
        yield np.asarray(running)


def padded_blocks(rows: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Yields the rows in blocks of exactly `size`; the last block is padded with copies of its last row."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])


def embed_stored(
    store: EmbeddingStore,
    keys: Sequence[bytes],
    encode: Callable[[Array], Array],
    batches: Callable[[np.ndarray], Iterable[Array]],
) -> np.ndarray:
    """Returns the embeddings of the contents with these keys, (len(keys), D) float32; those in the store are reused.

    Contents without an embedding in the store are embedded (equal contents only once) and saved batch by batch, so that
    a stopped run continues where it stopped. With several processes only the primary opens the store; it broadcasts
    what is missing and the result.

    Args:
      keys: the content key of each picture or caption (`content_key`).
      encode: batch -> embeddings.
      batches: positions in `keys` -> batches of those contents, of one shape, as in `embed`.
    """
    primary = jax.process_index() == 0
    is_missing = np.zeros(len(keys), bool)
    with store if primary else nullcontext():
        if primary:
            is_missing[store.missing(keys)] = True
        positions = np.flatnonzero(_from_primary(is_missing))
        start = 0
        for rows in _encoded(encode, batches(positions)) if len(positions) else ():
            new = positions[start : start + len(rows)]
            start += len(rows)
            if primary:
                store.append([keys[position] for position in new], rows[: len(new)])
        vectors = store.vectors(keys) if primary else np.zeros((len(keys), store.dimension), np.float32)
    return _from_primary(vectors)


def _from_primary(array: np.ndarray) -> np.ndarray:
    """Returns the primary process's array on every process."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array
