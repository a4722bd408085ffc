"""The order of a dataset's examples, found on disk: neither memory nor imports grow with the catalogue."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tensorflow_datasets.core import hashing, shuffle

from jaxclip.catalog.spool import Spool

Record = tuple[int, bytes]
HALF = 64  # bits of a hashed key that one number of an array holds


class Shuffler:
    """Sorts examples by their hashed keys, as `tfds.core.shuffle.Shuffler` does and in its place.

    TFDS keeps examples in memory up to a limit, 1 GB by default; past it, it opens a thousand files through TensorFlow,
    whose import alone takes some 700 MB. This one keeps 24 bytes of an example, whatever its size.
    """

    def __init__(self, dirpath: os.PathLike, hash_salt: str | bytes, disable_shuffling: bool = False, **unused: object):
        if disable_shuffling:
            raise NotImplementedError("examples are always shuffled here")
        self._hasher = hashing.Hasher(hash_salt)
        self._high, self._low = array("Q"), array("Q")
        self._spool = Spool[bytes](Path(dirpath))
        self.size = 0

    @property
    def num_examples(self) -> int:
        """How many were added."""
        return len(self._spool)

    @property
    def bucket_lengths(self) -> Sequence[int]:
        """How many examples each file on disk holds: there is one."""
        return [len(self._spool)]

    def add(self, key: str | bytes | int, data: bytes) -> None:
        """Adds an example."""
        hashed = self._hasher.hash_key(key)
        self._high.append(hashed >> HALF)
        self._low.append(hashed & (2**HALF - 1))
        self._spool.append(data)
        self.size += len(data)

    def __iter__(self) -> Iterator[Record]:
        """Yields (hashed key, example) by increasing key; DuplicatedKeysError where two are the same."""
        before: Record | None = None
        with self._spool:
            for index in np.lexsort((self._low, self._high)):
                record = self._high[index] << HALF | self._low[index], self._spool[index]
                if before and before[0] == record[0]:
                    raise shuffle.DuplicatedKeysError(record[1], before[1])
                yield record
                before = record


@contextmanager
def on_disk() -> Iterator[None]:
    """While the context lasts, TFDS sorts what it writes with `Shuffler`."""
    theirs, shuffle.Shuffler = shuffle.Shuffler, Shuffler
    try:
        yield
    finally:
        shuffle.Shuffler = theirs
