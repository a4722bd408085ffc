"""From a raw catalogue to a prepared dataset: one TFDS dataset of ArrayRecord files, with its data card beside it."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from jaxclip.catalog import card, groups
from jaxclip.catalog.describe import TEXT, Column, Describer
from jaxclip.catalog.examine import examine
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS
from jaxclip.catalog.spool import Spool
from jaxclip.errors import UserError

NAME, VERSION = "catalogue", "1.0.0"
CARD = "card.html"
WHOLE = "whole"  # the one split of a catalogue that is not split; TFDS keeps the name "all" for itself
DESCRIBED = "features"
"""Where a source's settings have those of its describer."""
SORTED_IN_MEMORY = 64 * 2**20
"""Bytes of examples that TFDS keeps to sort them by their hashed keys; more go to disk first. Its default is 1 GB."""

Progress = Callable[..., Iterable]


@dataclass(frozen=True)
class Source:
    """What a prepared dataset is made from.

    Attributes:
      reader: a key of READERS.
      path: the raw catalogue.
      test: products held back for testing, a number or (below 1) a share; 0 keeps the catalogue whole.
      split_seed: of the split.
      columns: role -> column, for readers of tables.
      describer: what is computed of each product and stored with it; None for nothing.
    """

    reader: str
    path: Path
    test: float
    split_seed: int
    columns: Mapping[str, str]
    describer: Describer | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the values by which a prepared dataset is recognised, as JSON values."""
        settings = {
            "reader": self.reader,
            "path": str(self.path.resolve()),
            "test": self.test,
            "split_seed": self.split_seed,
            "columns": dict(self.columns),
        }
        return settings | ({DESCRIBED: self.describer.settings()} if self.describer else {})

    def key(self) -> str:
        """Returns 12 hex digits that change with the settings and whenever the raw catalogue's listing does."""
        listing = [self.path, *sorted(p for p in self.path.glob("*") if p.is_file() or p.is_dir())]
        stamps = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in listing if p.exists()]
        return hashlib.sha256(json.dumps([self.settings(), stamps]).encode()).hexdigest()[:12]


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

    def __init__(self, folder: Path):
        self.products = Spool[Product](folder)
        self.pictures = Spool[bytes](folder)
        self.descriptions = Spool[dict[str, Any]](folder)
        self.sizes: list[tuple[int, int]] = []
        self.hashes: list[str] = []
        self.oddities: list[Oddity] = []

    def __enter__(self) -> "Collected":
        return self

    def __exit__(self, *error: object) -> None:
        for spool in (self.products, self.pictures, self.descriptions):
            spool.close()


class Grouped(Sequence):
    """Products with the groups found for them, made as they are asked for."""

    def __init__(self, products: Sequence[Product], names: Sequence[str]):
        self._products, self._names = products, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Product:
        return replace(self._products[index], group=self._names[index])


class CatalogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes products with their pictures, captions, category, attributes (a JSON object) and group."""

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    # There are no downloads and no checksums of them. TFDS 4.9.10 would look for these with importlib_resources, which
    # it does not declare and etils no longer brings along.
    code_path = None

    def __init__(
        self,
        splits: Mapping[str, list[int]],
        products: Sequence[Product],
        pictures: Sequence[bytes],
        columns: Mapping[str, Column],
        descriptions: Sequence[Mapping[str, Any]],
        about: dict[str, Any],
        progress: Progress,
        data_dir: Path,
    ):
        self._split_rows, self._products, self._pictures = splits, products, pictures
        self._columns, self._descriptions = columns, descriptions
        self._about, self._progress = about, progress
        names = sorted({product.group for product in products})
        self._group_numbers = {name: number for number, name in enumerate(names)}
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "category": tfds.features.Text(),
            "attributes": tfds.features.Text(),
            "group": tfds.features.Scalar(np.int64),
        } | {name: _feature(column) for name, column in self._columns.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Products prepared for text-to-image retrieval.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._about),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split, rows) for split, rows in self._split_rows.items()}

    def _generate_examples(self, split: str, rows: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self._progress(rows, total=len(rows), desc=f"writing {split}", unit="product"):
            product = self._products[row]
            yield (
                product.id,
                {
                    "id": product.id,
                    "image": self._pictures[row],
                    "captions": list(product.captions),
                    "category": product.category,
                    "attributes": json.dumps(dict(product.attributes), ensure_ascii=False),
                    "group": self._group_numbers[product.group],
                    **(self._descriptions[row] if self._columns else {}),
                },
            )


def _feature(column: Column) -> tfds.features.FeatureConnector:
    if column.dtype != TEXT:
        return tfds.features.Tensor(shape=column.shape, dtype=np.dtype(column.dtype))
    return tfds.features.Sequence(tfds.features.Text()) if column.shape else tfds.features.Text()


def folder(prepared: Path) -> Path:
    """Returns where the TFDS files of a prepared dataset are."""
    return prepared / NAME / VERSION


def is_prepared(prepared: Path) -> bool:
    """Returns whether a complete dataset is there; an interrupted preparation never is."""
    return (folder(prepared) / "dataset_info.json").exists()


def about(prepared: Path) -> dict[str, Any]:
    """Returns what `prepare` recorded of a dataset: its source's settings, counts, oddities and fingerprint."""
    return json.loads((folder(prepared) / "metadata.json").read_text())


def prepare(source: Source, prepared: Path, *, progress: Progress, workers: int = 0) -> None:
    """Writes the prepared dataset and its data card (card.html) into the folder `prepared`, whole or not at all.

    Args:
      source: what it is made from.
      prepared: made where it is missing.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops.
      workers: that check and describe pictures (see `examine`); 0 is one for each core.

    Raises:
      UserError: the catalogue is unreadable or none of its products has a readable picture.
    """
    missing = [path for path in (prepared, *prepared.parents) if not path.exists()]
    prepared.mkdir(parents=True, exist_ok=True)
    try:
        _prepare(source, prepared, progress, workers)
    except BaseException:
        _clear(prepared)
        if missing:
            shutil.rmtree(prepared, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that holds something else by now stays
            for parent in missing[1:]:
                parent.rmdir()
        raise


def _prepare(source: Source, prepared: Path, progress: Progress, workers: int) -> None:
    _clear(prepared)
    with Collected(prepared) as found:
        _collect(source, found, prepared, progress, workers)
        if not found.products:
            raise UserError(f"{source.path}: no product has a readable image ({_counted(found.oddities)})")
        names = groups.assign(found.products, found.hashes)
        products = Grouped(found.products, names)
        splits = _splits(names, source)
        facts = {
            "source": source.settings(),
            "products": len(products),
            "groups": len(set(names)),
            "splits": {split: len(rows) for split, rows in splits.items()},
            "dropped": _count(found.oddities, dropped=True),
            "mended": _count(found.oddities, dropped=False),
            "fingerprint": _fingerprint(products, found.hashes, splits),
        }
        # The dataset comes last: a folder that holds one has its card too.
        card.write(
            prepared / CARD, facts, products, found.pictures, found.sizes, found.descriptions or None, found.oddities
        )
        columns = source.describer.columns if source.describer else {}
        tfds.disable_progress_bar()
        shuffle.MAX_MEM_BUFFER_SIZE = SORTED_IN_MEMORY
        builder = CatalogueBuilder(
            splits, products, found.pictures, columns, found.descriptions, facts, progress, prepared
        )
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=downloads)


def _clear(prepared: Path) -> None:
    """Removes what preparations wrote and nothing else: the user's folder may hold a folder `catalogue` of its own."""
    for path in (folder(prepared), *folder(prepared).parent.glob(f"incomplete.*_{VERSION}")):
        shutil.rmtree(path, ignore_errors=True)
    (prepared / CARD).unlink(missing_ok=True)


def _collect(source: Source, found: Collected, prepared: Path, progress: Progress, workers: int) -> None:
    """Fills `found` with the products whose pictures can be read and with all oddities."""
    with Spool[Product](prepared) as read:
        for row in READERS[source.reader](source.path, source.columns):
            (found.oddities if isinstance(row, Oddity) else read).append(row)
        what = "describing" if source.describer else "checking pictures"
        for done in progress(examine(read, source.describer, workers), total=len(read), desc=what, unit="img"):
            if isinstance(done.picture, str):
                found.oddities.append(Oddity(str(done.product.image), done.picture, dropped=True))
                continue
            found.products.append(done.product)
            found.pictures.append(done.picture.encoded)
            found.sizes.append((done.picture.width, done.picture.height))
            found.hashes.append(done.picture.pixels)
            if done.description:
                found.descriptions.append(dict(done.description.values))
                found.oddities += [Oddity(done.product.id, what, dropped=False) for what in done.description.oddities]


def _splits(names: list[str], source: Source) -> dict[str, list[int]]:
    if not source.test:
        return {WHOLE: list(range(len(names)))}
    tests = groups.split(names, source.test, source.split_seed)
    return {
        "train": list(itertools.compress(range(len(names)), [not test for test in tests])),
        "test": list(itertools.compress(range(len(names)), tests)),
    }


def _count(oddities: list[Oddity], *, dropped: bool) -> dict[str, int]:
    return dict(Counter(oddity.what for oddity in oddities if oddity.dropped == dropped).most_common())


def _counted(oddities: list[Oddity]) -> str:
    counts = _count(oddities, dropped=True)
    return "; ".join(f"{what}: {count}" for what, count in counts.items()) or "no product was found"


def _fingerprint(products: Sequence[Product], hashes: list[str], splits: Mapping[str, list[int]]) -> str:
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            p = products[row]
            record = [split, p.id, hashes[row], p.captions, p.category, sorted(p.attributes.items())]
            digest.update(json.dumps(record).encode())
    return digest.hexdigest()[:12]
