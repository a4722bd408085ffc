"""Sorts a dataset's examples by hashed key, on disk, without TensorFlow and with little memory."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tensorflow_datasets.core import hashing, shuffle

from jaxclip.catalog.spool import Spool

Record = tuple[int, bytes]
HALF = 64  # bits of the 128-bit hashed key that fit into one array element


class Shuffler:
    """Sorts examples by hashed key; replaces `tfds.core.shuffle.Shuffler`, except for `disable_shuffling`.

    TFDS keeps up to 1 GB of examples in memory and then opens a thousand files through TensorFlow, whose import needs
    about 700 MB. This class needs 24 bytes of memory per example, and at least 8 more while it sorts.
    """

    def __init__(self, dirpath: os.PathLike, hash_salt: str | bytes, disable_shuffling: bool = False, **unused: object):
        if disable_shuffling:
            raise NotImplementedError("disable_shuffling is not supported")
        self._hasher = hashing.Hasher(hash_salt)
        self._high, self._low = array("Q"), array("Q")
        self._spool = Spool[bytes](Path(dirpath))
        self.size = 0

    @property
    def num_examples(self) -> int:
        """The number of examples added."""
        return len(self._spool)

    @property
    def bucket_lengths(self) -> Sequence[int]:
        """The number of examples in each file on disk, of which there is one."""
        return [len(self._spool)]

    def add(self, key: str | bytes | int, data: bytes) -> None:
        """Adds an example, serialized as `data`."""
        hashed = self._hasher.hash_key(key)
        self._high.append(hashed >> HALF)
        self._low.append(hashed & (2**HALF - 1))
        self._spool.append(data)
        self.size += len(data)

    def __iter__(self) -> Iterator[Record]:
        """Yields (hashed key, example) by increasing hashed key, once, and then closes the file.

        Raises:
          DuplicatedKeysError: two hashed keys are equal.
        """
        previous: Record | None = None
        with self._spool:
            for index in np.lexsort((self._low, self._high)):
                record = self._high[index] << HALF | self._low[index], self._spool[index]
                if previous and previous[0] == record[0]:
                    raise shuffle.DuplicatedKeysError(record[1], previous[1])
                yield record
                previous = record


@contextmanager
def on_disk() -> Iterator[None]:
    """Makes TFDS use `Shuffler` within the context."""
    original, shuffle.Shuffler = shuffle.Shuffler, Shuffler
    try:
        yield
    finally:
        shuffle.Shuffler = original
