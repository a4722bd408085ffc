"""A catalogue as files of a few hundred products each, which workers on several machines share."""

import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxclip.catalog.dataset import Label
from jaxclip.catalog.describe import Describer
from jaxclip.catalog.examine import BLOCK, blocks, examine_block
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.runtime import files

PART = 4 * BLOCK
"""Products per part; a worker processes one part at a time."""


@dataclass(frozen=True)
class Verdict:
    """The result of examining a product, which is dropped if it has no picture.

    Attributes:
      product: the product, with those of its pictures that are stored.
      left_out: (location, reason) of each picture that was left out.
      sizes: width and height of its pictures in pixels.
      pixels: `Picture.pixels` of its pictures.
      offsets: byte offsets of its pictures in the part's file of pictures, and of the end of the last one.
      oddities: the kinds of oddity that were mended.
    """

    product: Product
    left_out: tuple[tuple[str, str], ...]
    sizes: tuple[tuple[int, int], ...]
    pixels: tuple[str, ...]
    offsets: tuple[int, ...]
    oddities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Products in a folder that every worker can reach under the same path.

    Products are numbered in the order in which they were written, and dropped products keep their numbers: product
    `number` is row `number % PART` of part `number // PART`. Files are replaced atomically and their contents are
    deterministic, so a worker may die, or repeat the part of another worker.
    """

    folder: Path

    def write(self, products: Iterable[Product]) -> int:
        """Writes the products and returns the number of parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, parts = iter(products), 0
        while part := list(itertools.islice(rows, PART)):
            self._dump(parts, "products", part)
            parts += 1
        return parts

    def examine(self, part: int, describer: Describer | None) -> None:
        """Checks and describes a part's products and writes the results, with only one block of pictures in memory."""
        products = self._load(part, "products")
        verdicts, descriptions = [], []
        with _write_atomically(self._path(part, "pictures")) as file:
            for block in blocks(products):
                for result in examine_block(block, describer):
                    descriptions.append(result.description.values if result.description else {})
                    offsets = [file.tell()]
                    for picture in result.pictures:
                        file.write(picture.encoded)
                        offsets.append(file.tell())
                    sizes = tuple((picture.width, picture.height) for picture in result.pictures)
                    pixels = tuple(picture.pixels for picture in result.pictures)
                    mended = result.description.oddities if result.description else ()
                    verdicts.append(Verdict(result.product, result.left_out, sizes, pixels, tuple(offsets), mended))
        self._dump(part, "descriptions", descriptions)
        self._dump(part, "verdicts", verdicts)

    def verdicts(self, parts: int) -> Iterator[tuple[int, Verdict]]:
        """Yields the number and verdict of each product of the first `parts` parts, in order."""
        for part in range(parts):
            for row, verdict in enumerate(self._load(part, "verdicts")):
                yield part * PART + row, verdict

    def write_assignments(self, part: int, assignments: Mapping[int, tuple[str, Label]]) -> None:
        """Writes row in the part -> (split, label), for the kept products of a part."""
        self._dump(part, "assignments", dict(assignments))

    def assigned_products(
        self, part: int, split: str
    ) -> Iterator[tuple[Product, Label, tuple[bytes, ...], Mapping[str, Any]]]:
        """Yields (product, label, encoded pictures, description) for each product of a part that is in the split."""
        assignments, *columns = (self._load(part, kind) for kind in ("assignments", "verdicts", "descriptions"))
        rows = list(zip(*columns, strict=True))
        with self._path(part, "pictures").open("rb") as file:
            for row, (assigned_split, label) in assignments.items():
                if assigned_split == split:
                    verdict, description = rows[row]
                    yield verdict.product, label, _read_pictures(file, verdict), description

    def pictures(self, number: int) -> tuple[bytes, ...]:
        """Returns the encoded pictures of product `number`, which must be a kept one."""
        part, row = divmod(number, PART)
        with self._path(part, "pictures").open("rb") as file:
            return _read_pictures(file, self._load(part, "verdicts")[row])

    def description(self, number: int) -> Mapping[str, Any]:
        """Returns the describer's values for product `number`, numbered as in `Parts`; empty for a dropped product."""
        part, row = divmod(number, PART)
        return self._load(part, "descriptions")[row]

    def _path(self, part: int, kind: str) -> Path:
        return self.folder / f"{part:06}.{kind}"

    def _dump(self, part: int, kind: str, content: Any) -> None:
        with _write_atomically(self._path(part, kind)) as file:
            pickle.dump(content, file, pickle.HIGHEST_PROTOCOL)

    def _load(self, part: int, kind: str) -> Any:
        path = self._path(part, kind)
        try:
            return pickle.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist on this machine: the prepared dataset's folder must be shared by all workers "
                "under the same path"
            ) from None


class LazySelection(Sequence):
    """The results of `read` for a sequence of numbers; a result is read each time it is accessed."""

    def __init__(self, read: Callable[[int], Any], numbers: Sequence[int]):
        self._read, self._numbers = read, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return self._read(self._numbers[index])


@contextmanager
def _write_atomically(path: Path) -> Iterator[BinaryIO]:
    with files.atomically(path) as temporary, temporary.open("wb") as file:
        yield file


def _read_pictures(file: BinaryIO, verdict: Verdict) -> tuple[bytes, ...]:
    file.seek(verdict.offsets[0])
    return tuple(file.read(stop - start) for start, stop in itertools.pairwise(verdict.offsets))
