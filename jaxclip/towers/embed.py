"""All pictures or captions of a split into embeddings, kept on disk as they are made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from jaxclip.towers.store import EmbeddingStore


def embed(encode: Callable[[Array], Array], batches: Iterable[Array], count: int) -> np.ndarray:
    """Returns the embeddings of the first `count` rows of the batches, (count, D) float32.

    The batches have one shape, so that `encode` is compiled once; rows beyond `count` fill up the last one and are cut
    off. One batch is computed while the one before is copied back.
    """
    rows = np.concatenate(list(_encoded(encode, batches)))
    if len(rows) < count:
        raise ValueError(f"{count} rows expected, the batches hold {len(rows)}")
    return rows[:count]


def _encoded(encode: Callable[[Array], Array], batches: Iterable[Array]) -> Iterator[np.ndarray]:
    running = None
    for batch in batches:
        started = encode(batch)
        if running is not None:
            yield np.asarray(running)
        running = started
    if running is not None:
        yield np.asarray(running)


def padded_blocks(rows: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Yields the rows in blocks of exactly `size`; the last one is filled up with its last row."""
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        yield np.concatenate([block, np.repeat(block[-1:], size - len(block), axis=0)])


def embed_stored(
    store: EmbeddingStore,
    keys: Sequence[bytes],
    encode: Callable[[Array], Array],
    batches: Callable[[np.ndarray], Iterable[Array]],
) -> np.ndarray:
    """Returns the embeddings of what the keys stand for, (len(keys), D), from the store where it has them.

    The others are embedded, equal ones once, and kept there batch by batch, so that what is interrupted goes on where
    it was. Where several processes embed together the first one keeps the store and tells the others.

    Args:
      batches: batches(numbers) yields the batches of what these numbers of keys stand for, as `embed` takes them.
    """
    first = jax.process_index() == 0
    wanted = np.zeros(len(keys), bool)
    with store if first else nullcontext():
        if first:
            wanted[store.missing(keys)] = True
        numbers = np.flatnonzero(_of_the_first(wanted))
        start = 0
        for rows in _encoded(encode, batches(numbers)) if len(numbers) else ():
            new = numbers[start : start + len(rows)]
            start += len(rows)
            if first:
                store.append([keys[number] for number in new], rows[: len(new)])
        vectors = store.vectors(keys) if first else np.zeros((len(keys), store.dimension), np.float32)
    return _of_the_first(vectors)


def _of_the_first(array: np.ndarray) -> np.ndarray:
    """Returns what the first process has, on every process."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array)) if jax.process_count() > 1 else array
