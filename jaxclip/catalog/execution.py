"""How the products of a catalogue are processed: on this machine, or with Apache Beam (`catalog.beam`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from jaxclip.catalog.dataset import Label, example
from jaxclip.catalog.describe import Describer
from jaxclip.catalog.examine import examine
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.spool import Spool

Progress = Callable[..., Iterable]


@dataclass
class Collected:
    """The result of the first pass over a catalogue; large fields are on disk.

    All fields but `oddities` have one entry per kept product, in the same order.

    Attributes:
      products: the products as the reader yielded them, without pictures that cannot be stored.
      pictures: the encoded pictures of each product as they will be stored.
      descriptions: the describer's values of each product; empty without a describer.
      sizes: (width, height), in pixels, of each product's pictures.
      hashes: `Picture.pixels` of each product's pictures.
      oddities: everything that was dropped or mended, by the reader or later.
    """

    products: Sequence[Product]
    pictures: Sequence[tuple[bytes, ...]]
    descriptions: Sequence[Mapping[str, Any]]
    sizes: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    hashes: list[tuple[str, ...]] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)


class Execution(Protocol):
    """A way to process the products of a catalogue; every implementation gives the same examples."""

    def collect(
        self, rows: Iterable[Product | Oddity], describer: Describer | None
    ) -> AbstractContextManager[Collected]:
        """Returns a context manager of the products with readable pictures, their descriptions and all oddities."""
        ...

    def examples(
        self, collected: Collected, labels: Sequence[Label], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Any]:
        """Returns split -> the examples of the split, in the form that `CatalogueBuilder` expects.

        Args:
          collected: the result of `collect`, whose context must still be open.
          labels: the label of each kept product.
          splits: split -> indices of its products among the kept products.
        """
        ...

    def download_config(self) -> tfds.download.DownloadConfig:
        """Returns the TFDS configuration for writing the dataset."""
        ...


@dataclass(frozen=True)
class LocalExecution:
    """Processes products in this process and in the threads or processes of `examine`, a few blocks at a time.

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
            Spool[tuple[bytes, ...]](self.folder) as pictures,
            Spool[Mapping[str, Any]](self.folder) as descriptions,
        ):
            collected = Collected(products, pictures, descriptions)
            with Spool[Product](self.folder) as read:
                for row in rows:
                    (collected.oddities if isinstance(row, Oddity) else read).append(row)
                task = "describing" if describer else "checking pictures"
                examined = examine(read, describer, self.workers)
                for result in self.progress(examined, total=len(read), desc=task, unit="product"):
                    collected.oddities += [Oddity(*found, dropped=True) for found in result.left_out]
                    if not result.pictures:
                        continue
                    products.append(result.product)
                    pictures.append(tuple(picture.encoded for picture in result.pictures))
                    collected.sizes.append(tuple((picture.width, picture.height) for picture in result.pictures))
                    collected.hashes.append(tuple(picture.pixels for picture in result.pictures))
                    if result.description:
                        descriptions.append(dict(result.description.values))
                        collected.oddities += [mended(result.product, kind) for kind in result.description.oddities]
            yield collected

    def examples(
        self, collected: Collected, labels: Sequence[Label], splits: Mapping[str, Sequence[int]]
    ) -> Mapping[str, Iterator[tuple[str, dict[str, Any]]]]:
        return {split: self._examples(collected, labels, split, rows) for split, rows in splits.items()}

    def download_config(self) -> tfds.download.DownloadConfig:
        return tfds.download.DownloadConfig()

    def _examples(
        self, collected: Collected, labels: Sequence[Label], split: str, rows: Sequence[int]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self.progress(rows, total=len(rows), desc=f"writing {split}", unit="product"):
            description = collected.descriptions[row] if collected.descriptions else {}
            yield example(collected.products[row], labels[row], collected.pictures[row], description)


def mended(product: Product, kind: str) -> Oddity:
    """Returns the oddity of a product whose description was mended."""
    return Oddity(product.id, kind, dropped=False)
