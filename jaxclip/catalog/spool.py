"""A sequence in a temporary file, so that memory hardly grows with the catalogue."""

import pickle
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Spool(Sequence, Generic[T]):
    """Items in the order in which they were appended; an item is read from disk each time it is accessed.

    It needs 8 bytes of memory per item. The file is deleted when the spool is closed or the process ends.
    """

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, stays open as long as the spool
        self._starts = array("Q")

    def append(self, item: T) -> None:
        """Adds an item at the end."""
        self._starts.append(self._file.seek(0, 2))
        pickle.dump(item, self._file, pickle.HIGHEST_PROTOCOL)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> T:
        self._file.seek(self._starts[index])
        return pickle.load(self._file)

    def __iter__(self) -> Iterator[T]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Closes and deletes the file."""
        self._file.close()

    def __enter__(self) -> "Spool[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
