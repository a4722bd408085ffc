"""Where the work on each product is done: in this process and its workers here, in `catalog.beam` on Apache Beam."""

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
    """What a first pass over a catalogue finds, on disk but for hashes and oddities; one entry for each product kept.

    Attributes:
      products: as they were read.
      pictures: encoded, as they will be stored.
      descriptions: the describer's values, where there is one.
      sizes: (width, height) of the pictures.
      hashes: of the pictures' pixels.
      oddities: everything that was dropped or mended.
    """

    products: Sequence[Product]
    pictures: Sequence[bytes]
    descriptions: Sequence[Mapping[str, Any]]
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)


class Execution(Protocol):
    """A way to do the work on each product; all give the same dataset."""

    def collect(
        self, rows: Iterable[Product | Oddity], describer: Describer | None
    ) -> AbstractContextManager[Collected]:
        """Returns the products whose pictures can be read, described, and all oddities, while the context lasts."""
        ...

    def examples(
        self, found: Collected, groups: Sequence[int], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Any]:
        """Returns what yields the examples of each split, as `CatalogueBuilder` takes it.

        Args:
          found: by `collect`, whose context lasts.
          groups: the group of each product.
          splits: the indices of their products.
        """
        ...

    def download_config(self) -> tfds.download.DownloadConfig:
        """Returns how TFDS is to write the dataset."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Products go through this process, a few blocks at a time.

    Attributes:
      folder: for temporary files.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.
      workers: as `examine` takes it.
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
            found = Collected(products, pictures, descriptions)
            with Spool[Product](self.folder) as read:
                for row in rows:
                    (found.oddities if isinstance(row, Oddity) else read).append(row)
                what = "describing" if describer else "checking pictures"
                examined = examine(read, describer, self.workers)
                for done in self.progress(examined, total=len(read), desc=what, unit="img"):
                    if isinstance(done.picture, str):
                        found.oddities.append(dropped(done.product, done.picture))
                        continue
                    products.append(done.product)
                    pictures.append(done.picture.encoded)
                    found.sizes.append((done.picture.width, done.picture.height))
                    found.hashes.append(done.picture.pixels)
                    if done.description:
                        descriptions.append(dict(done.description.values))
                        found.oddities += [mended(done.product, what) for what in done.description.oddities]
            yield found

    def examples(
        self, found: Collected, groups: Sequence[int], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {split: self._examples(found, groups, split, rows) for split, rows in splits.items()}

    def download_config(self) -> tfds.download.DownloadConfig:
        return tfds.download.DownloadConfig()

    def _examples(
        self, found: Collected, groups: Sequence[int], split: str, rows: Sequence[int]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self.progress(rows, total=len(rows), desc=f"writing {split}", unit="product"):
            description = found.descriptions[row] if found.descriptions else {}
            yield example(found.products[row], groups[row], found.pictures[row], description)


def dropped(product: Product, reason: str) -> Oddity:
    """Returns the oddity that cost a product."""
    return Oddity(str(product.image), reason, dropped=True)


def mended(product: Product, what: str) -> Oddity:
    """Returns an oddity met in describing a product."""
    return Oddity(product.id, what, dropped=False)
