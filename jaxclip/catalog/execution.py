"""Processes each product in this process and its local workers; `catalog.beam` does the same on Apache Beam."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from jaxclip.catalog.dataset import example
from jaxclip.catalog.describe import Describer
from jaxclip.catalog.examine import examine
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.spool import Spool

Progress = Callable[..., Iterable]


@dataclass
class Collected:
    """The result of the first pass over a catalogue: one entry per product kept; all large fields are on disk.

    Attributes:
      products: the products as read.
      pictures: the encoded pictures as they will be stored.
      descriptions: the describer's values; empty without a describer.
      sizes: (width, height) of the pictures in pixels.
      hashes: hashes of the pictures' pixels.
      oddities: everything that was dropped or mended.
    """

    products: Sequence[Product]
    pictures: Sequence[bytes]
    descriptions: Sequence[Mapping[str, Any]]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)


class Execution(Protocol):
    """A way to run the work on each product; every way gives the same dataset."""

    def collect(
        self, rows: Iterable[Product | Oddity], describer: Describer | None
    ) -> AbstractContextManager[Collected]:
        """Returns the products with readable pictures, their descriptions and all oddities, for use in the context."""
        ...

    def examples(
        self, collected: Collected, groups: Sequence[int], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Any]:
        """Returns split -> source of its examples, as `CatalogueBuilder` takes it.

        Args:
          collected: the result of `collect`, whose context must still be open.
          groups: the group of each product.
          splits: split -> indices of its products.
        """
        ...

    def download_config(self) -> tfds.download.DownloadConfig:
        """Returns the TFDS configuration for writing the dataset."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Processes products in this process, a few blocks at a time.

    Attributes:
      folder: folder for temporary files.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.
      workers: number of threads or processes, see `examine`.
    """

    folder: Path
    progress: Progress
    workers: int

    @contextmanager
    def collect(self, rows: Iterable[Product | Oddity], describer: Describer | None) -> Iterator[Collected]:
        with (
            Spool[Product](self.folder) as products,
            Spool[bytes](self.folder) as pictures,
            Spool[Mapping[str, Any]](self.folder) as descriptions,
        ):
            collected = Collected(products, pictures, descriptions)
            with Spool[Product](self.folder) as read:
                for row in rows:
                    (collected.oddities if isinstance(row, Oddity) else read).append(row)
                what = "describing" if describer else "checking pictures"
                examined = examine(read, describer, self.workers)
                for done in self.progress(examined, total=len(read), desc=what, unit="img"):
                    if isinstance(done.picture, str):
                        collected.oddities.append(dropped(done.product, done.picture))
                        continue
                    products.append(done.product)
                    pictures.append(done.picture.encoded)
                    collected.sizes.append((done.picture.width, done.picture.height))
                    collected.hashes.append(done.picture.pixels)
                    if done.description:
                        descriptions.append(dict(done.description.values))
                        collected.oddities += [mended(done.product, what) for what in done.description.oddities]
            yield collected

    def examples(
        self, collected: Collected, groups: Sequence[int], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {split: self._examples(collected, groups, split, rows) for split, rows in splits.items()}

    def download_config(self) -> tfds.download.DownloadConfig:
        return tfds.download.DownloadConfig()

    def _examples(
        self, collected: Collected, groups: Sequence[int], split: str, rows: Sequence[int]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self.progress(rows, total=len(rows), desc=f"writing {split}", unit="product"):
            description = collected.descriptions[row] if collected.descriptions else {}
            yield example(collected.products[row], groups[row], collected.pictures[row], description)


def dropped(product: Product, reason: str) -> Oddity:
    """Returns the oddity of a product that was dropped."""
    return Oddity(str(product.image), reason, dropped=True)


def mended(product: Product, what: str) -> Oddity:
    """Returns the oddity of a product that was mended while it was described."""
    return Oddity(product.id, what, dropped=False)
