"""Turns a raw catalogue into a prepared dataset: a TFDS dataset of ArrayRecord files, and its data card."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxclip.catalog import card, groups, shuffler
from jaxclip.catalog.dataset import NAME, VERSION, CatalogueBuilder
from jaxclip.catalog.describe import Describer
from jaxclip.catalog.execution import Execution, LocalExecution, Progress
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError

CARD = "card.html"
WHOLE = "whole"  # the only split of a dataset prepared without a test split; TFDS reserves the name "all"
DESCRIBER_KEY = "features"
"""Key of the describer's settings in `Source.settings()`."""


@dataclass(frozen=True)
class Source:
    """The raw catalogue and the settings from which a dataset is prepared.

    Attributes:
      reader: a key of READERS.
      path: the file or folder of the raw catalogue.
      test: size of the test split: a number of products, or a share of them if below 1; 0 for the single split WHOLE.
      split_seed: seed of the choice of test products.
      columns: role -> the catalogue's name for it, for readers whose columns can be configured (see `Reader`).
      describer: computes further values of each product, which are stored with it; None to store none.
    """

    reader: str
    path: Path
    test: float
    split_seed: int
    columns: Mapping[str, str]
    describer: Describer | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the settings that identify a prepared dataset, as JSON values."""
        settings = {
            "reader": self.reader,
            "path": str(self.path.resolve()),
            "test": self.test,
            "split_seed": self.split_seed,
            "columns": dict(self.columns),
        }
        return settings | ({DESCRIBER_KEY: self.describer.settings()} if self.describer else {})

    def key(self) -> str:
        """Returns 12 hex digits of a hash of the settings and of the listing of the raw catalogue's top folder.

        The listing has the name, size and modification time of the catalogue and of each file and folder directly in
        it. Editing a file inside a subfolder therefore does not change the hash.
        """
        listing = [self.path, *sorted(p for p in self.path.glob("*") if p.is_file() or p.is_dir())]
        stamps = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in listing if p.exists()]
        return hashlib.sha256(json.dumps([self.settings(), stamps]).encode()).hexdigest()[:12]


class Grouped(Sequence):
    """Products whose groups are replaced by the given ones; each product is created when it is accessed."""

    def __init__(self, products: Sequence[Product], names: Sequence[str]):
        self._products, self._names = products, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Product:
        return replace(self._products[index], group=self._names[index])


def folder(prepared: Path) -> Path:
    """Returns the folder of a prepared dataset's TFDS files."""
    return prepared / NAME / VERSION


def is_prepared(prepared: Path) -> bool:
    """Returns whether the folder contains a complete dataset; False after an interrupted preparation."""
    return (folder(prepared) / "dataset_info.json").exists()


def metadata(prepared: Path) -> dict[str, Any]:
    """Returns the facts that `prepare` recorded, such as the source's settings, counts and the fingerprint."""
    return json.loads((folder(prepared) / "metadata.json").read_text())


def prepare(
    source: Source,
    prepared: Path,
    *,
    progress: Progress,
    workers: int = 0,
    runner: str = "",
    beam_options: Sequence[str] = (),
) -> None:
    """Writes the prepared dataset and its data card (card.html) into the folder `prepared`, completely or not at all.

    A dataset that is already in the folder is deleted first. The dataset depends on neither `workers` nor `runner`,
    except for its number of files.

    Args:
      source: the raw catalogue and its settings.
      prepared: the folder, created if it is missing.
      progress: `progress(iterable, total=, desc=, unit=)` wraps the long loops; ignored if there is a `runner`.
      workers: threads or processes that check and describe pictures (see `examine`); ignored if there is a `runner`.
      runner: the Apache Beam runner that does the work, "" for this machine. All workers must reach the catalogue and
        `prepared` under the same paths as this process.
      beam_options: options of the runner, as "--name=value".

    Raises:
      UserError: the catalogue is unreadable, no product has a readable picture, the test split is impossible, a worker
        process was killed, or the runner is not installed.
    """
    execution = (
        _beam_execution(runner, beam_options, prepared) if runner else LocalExecution(prepared, progress, workers)
    )
    missing = [path for path in (prepared, *prepared.parents) if not path.exists()]
    prepared.mkdir(parents=True, exist_ok=True)
    try:
        _prepare(source, prepared, execution)
    except BaseException:
        _clear(prepared)
        if missing:
            shutil.rmtree(prepared, ignore_errors=True)
        with contextlib.suppress(OSError):  # a parent that is no longer empty is kept
            for parent in missing[1:]:
                parent.rmdir()
        raise


def _beam_execution(runner: str, options: Sequence[str], prepared: Path) -> Execution:
    try:
        from jaxclip.catalog.beam import BeamExecution
    except ImportError as error:
        raise UserError(f"--runner={runner} needs {error.name}: pip install 'jaxclip[beam]'") from error
    intermediate = folder(prepared).parent / f"incomplete.parts_{VERSION}"  # a name that `_clear` removes
    return BeamExecution(runner, options, intermediate)


def _prepare(source: Source, prepared: Path, execution: Execution) -> None:
    _clear(prepared)
    with execution.collect(READERS[source.reader](source.path, source.columns), source.describer) as collected:
        if not collected.products:
            raise UserError(f"{source.path}: no product has a readable image ({_list_counts(collected.oddities)})")
        names = groups.assign(collected.products, collected.hashes)
        products = Grouped(collected.products, names)
        splits = _splits(names, source)
        facts = {
            "source": source.settings(),
            "products": len(products),
            "groups": len(set(names)),
            "largest_side": max(map(max, collected.sizes)),
            "splits": {split: len(rows) for split, rows in splits.items()},
            "dropped": _count(collected.oddities, dropped=True),
            "mended": _count(collected.oddities, dropped=False),
            "fingerprint": _fingerprint(products, collected.hashes, splits),
        }
        # The dataset is written last, so that a folder with a dataset always has a card.
        card.write(
            prepared / CARD,
            facts,
            products,
            collected.pictures,
            collected.sizes,
            collected.descriptions or None,
            collected.oddities,
        )
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        examples = execution.examples(collected, [numbers[name] for name in names], splits)
        columns = source.describer.columns if source.describer else {}
        tfds.disable_progress_bar()
        builder = CatalogueBuilder(examples, columns, facts, prepared)
        silent = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as downloads, silent, shuffler.on_disk():
            builder.download_and_prepare(download_dir=downloads, download_config=execution.download_config())


def _clear(prepared: Path) -> None:
    """Removes a dataset, its card and incomplete files from a folder.

    Nothing else is removed, because the user's folder may contain another folder named `catalogue`.
    """
    for path in (folder(prepared), *folder(prepared).parent.glob(f"incomplete.*_{VERSION}")):
        shutil.rmtree(path, ignore_errors=True)
    (prepared / CARD).unlink(missing_ok=True)


def _splits(names: list[str], source: Source) -> dict[str, list[int]]:
    if not source.test:
        return {WHOLE: list(range(len(names)))}
    tests = groups.split(names, source.test, source.split_seed)
    return {
        "train": list(itertools.compress(range(len(names)), [not test for test in tests])),
        "test": list(itertools.compress(range(len(names)), tests)),
    }


def _count(oddities: list[Oddity], *, dropped: bool) -> dict[str, int]:
    return dict(Counter(oddity.kind for oddity in oddities if oddity.dropped == dropped).most_common())


def _list_counts(oddities: list[Oddity]) -> str:
    counts = _count(oddities, dropped=True)
    return "; ".join(f"{kind}: {count}" for kind, count in counts.items()) or "it has no products"


def _fingerprint(products: Sequence[Product], hashes: list[str], splits: Mapping[str, list[int]]) -> str:
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            p = products[row]
            record = [split, p.id, hashes[row], p.captions, p.category, sorted(p.attributes.items())]
            digest.update(json.dumps(record).encode())
    return digest.hexdigest()[:12]
