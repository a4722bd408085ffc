"""Turns a raw catalogue into a prepared dataset: a TFDS dataset of ArrayRecord files, and its data card."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxclip.catalog import card, groups, ids, mend, shuffler
from jaxclip.catalog.dataset import NAME, OUTDATED, SOURCE, VERSION, CatalogueBuilder, Label
from jaxclip.catalog.describe import TEXT, Column, Describer
from jaxclip.catalog.execution import Execution, LocalExecution, Progress
from jaxclip.catalog.product import AS_TEST, Oddity, Product
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError

CARD = "card.html"
GROUP_KEYS = "group_keys.npz"
WHOLE = "whole"  # the only split of a dataset prepared without a test split; TFDS reserves the name "all"
DESCRIBER_KEY, PARTS = "features", "parts"
"""Keys of the describer's settings and of `Source.parts` in `Source.settings()`."""


@dataclass(frozen=True)
class Source:
    """The raw catalogue and the settings from which a dataset is prepared.

    Attributes:
      reader: a key of READERS; not read if there are `parts`.
      path: the file or folder of the raw catalogue; if there are `parts`, a name for all of them.
      test: size of the test split: a number of products, or a share of them if below 1; 0 for the single split WHOLE.
      split_seed: seed of the choice of test and validation products.
      columns: role -> the catalogue's name for it, for readers whose columns can be configured (see `Reader`).
      describer: computes further values of each product, which are stored with it; None to store none.
      validation: size of the validation split, given like `test`; AS_TEST, or 0 for none.
      unit: whether a product is an article with all its photos, or a single photo (see `product.UNITS`).
      parts: name -> (reader, path) of each catalogue, if several are prepared as one dataset; else empty.
    """

    reader: str
    path: Path
    test: float
    split_seed: int
    columns: Mapping[str, str]
    describer: Describer | None = None
    validation: float = 0.0
    unit: str = "article"
    parts: Mapping[str, tuple[str, Path]] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        """The file or folder of each raw catalogue."""
        return [path for _, path in self.parts.values()] or [self.path]

    def read(self) -> Iterator[Product | Oddity]:
        """Yields the products and oddities of all catalogues.

        The group that a reader states gets the names of the reader and of the catalogue, since others may use the same
        name for another article.
        """
        for name, (reader, path) in (self.parts or {"": (self.reader, self.path)}).items():
            for row in mend.rows(READERS[reader](path, self.columns, self.unit)):
                if isinstance(row, Product):
                    group = ":".join(filter(None, (reader, name, row.group))) if row.group else ""
                    row = replace(row, source=name, group=group)
                yield row

    def settings(self) -> dict[str, Any]:
        """Returns the settings that identify a prepared dataset, as JSON values."""
        settings = {
            "reader": self.reader,
            "path": self.path.name if self.parts else str(self.path.resolve()),
            "unit": self.unit,
            "test": self.test,
            "validation": self.validation if self.test else 0,
            "split_seed": self.split_seed,
            "columns": dict(self.columns),
        }
        if self.parts:
            settings[PARTS] = {name: [reader, str(path.resolve())] for name, (reader, path) in self.parts.items()}
        return settings | ({DESCRIBER_KEY: self.describer.settings()} if self.describer else {})

    def key(self) -> str:
        """Returns 12 hex digits of a hash of the settings and of the listing of the raw catalogue's top folder.

        The listing has the name, size and modification time of the catalogue and of each file and folder directly in
        it. Editing a file inside a subfolder therefore does not change the hash.
        """
        listing = []
        for path in self.paths:
            listing += [path, *sorted(p for p in path.glob("*") if p.is_file() or p.is_dir())]
        stamps = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in listing if p.exists()]
        return hashlib.sha256(json.dumps([self.settings(), stamps]).encode()).hexdigest()[:12]


class Labelled(Sequence):
    """Products whose ids and groups are replaced by the given ones; each product is created when it is accessed."""

    def __init__(self, products: Sequence[Product], ids: Sequence[str], groups: Sequence[str]):
        self._products, self._ids, self._groups = products, ids, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Product:
        return replace(self._products[index], id=self._ids[index], group=self._groups[index])


def folder(prepared: Path) -> Path:
    """Returns the folder of a prepared dataset's TFDS files."""
    return prepared / NAME / VERSION


def is_prepared(prepared: Path) -> bool:
    """Returns whether the folder contains a complete dataset; False after an interrupted preparation."""
    return (folder(prepared) / "dataset_info.json").exists()


def outdated(prepared: Path) -> dict[str, Any] | None:
    """Returns the source's settings of a dataset in a format of an earlier version, None if the folder has none."""
    folders = (prepared / NAME / old for old in OUTDATED)
    old = next((path for path in folders if (path / "dataset_info.json").exists()), None)
    if old is None or is_prepared(prepared):
        return None
    return json.loads((old / "metadata.json").read_text())["source"]


@dataclass(frozen=True)
class GroupKeys:
    """The keys (see `groups.Groups`) and splits of all groups of a prepared dataset.

    Attributes:
      keys: (K,) uint64 hashes.
      groups: (K,) the group of each key, as the records number them.
      splits: (groups,) name of each group's split.
    """

    keys: np.ndarray
    groups: np.ndarray
    splits: np.ndarray

    def of_split(self, split: str) -> np.ndarray:
        """Returns the groups of a split, or of all splits for "all"."""
        return np.flatnonzero((self.splits == split) | (split == "all"))


def group_keys(prepared: Path) -> GroupKeys:
    """Returns the keys of all groups of a prepared dataset; raises UserError if the file was not copied with it."""
    try:
        with np.load(prepared / GROUP_KEYS, allow_pickle=False) as file:
            return GroupKeys(**{name: file[name] for name in file.files})
    except FileNotFoundError:
        raise UserError(
            f"{prepared} has no {GROUP_KEYS}, by which products that a run was trained on are recognised: copy it from "
            "where the dataset was prepared, or delete the folder and prepare it again"
        ) from None


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
    with execution.collect(source.read(), source.describer) as collected:
        if not collected.products:
            raise UserError(f"{source.path}: no product has a readable image ({_list_counts(collected.oddities)})")
        stated = [product.id for product in collected.products]
        unique = ids.unique(stated)
        collected.oddities += [
            Oddity(own, ids.REPEATED, dropped=False) for own, id_ in zip(unique, stated, strict=True) if own != id_
        ]
        found = groups.assign(collected.products, unique, collected.hashes)
        names = found.names
        products = Labelled(collected.products, unique, names)
        splits = _splits(names, source)
        facts = {
            "source": source.settings(),
            "products": len(products),
            "pictures": sum(map(len, collected.hashes)),
            "groups": len(set(names)),
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
        group_numbers = np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))
        _write_group_keys(prepared / GROUP_KEYS, found, group_numbers, splits)
        labels = [
            Label(number, *label) for number, label in enumerate(zip(unique, group_numbers.tolist(), strict=True))
        ]
        examples = execution.examples(collected, labels, splits)
        columns = source.describer.columns if source.describer else {}
        columns = {**columns, **({SOURCE: Column((), TEXT)} if source.parts else {})}
        tfds.disable_progress_bar()
        builder = CatalogueBuilder(examples, columns, facts, prepared)
        silent = contextlib.redirect_stdout(io.StringIO())
        with tempfile.TemporaryDirectory() as downloads, silent, shuffler.on_disk():
            builder.download_and_prepare(download_dir=downloads, download_config=execution.download_config())


def _write_group_keys(
    path: Path, found: groups.Groups, group_numbers: np.ndarray, splits: Mapping[str, Sequence[int]]
) -> None:
    group_splits = np.empty(group_numbers.max() + 1, f"U{max(map(len, splits))}")
    for split, rows in splits.items():
        group_splits[group_numbers[rows]] = split
    with path.open("wb") as file:
        np.savez(file, keys=found.keys, groups=group_numbers[found.owners], splits=group_splits)


def _clear(prepared: Path) -> None:
    """Removes a dataset, its card and incomplete files from a folder.

    Nothing else is removed, because the user's folder may contain another folder named `catalogue`.
    """
    versions = folder(prepared).parent
    old_versions = (versions / old for old in OUTDATED)
    for path in (folder(prepared), *old_versions, *versions.glob(f"incomplete.*_{VERSION}")):
        shutil.rmtree(path, ignore_errors=True)
    for name in (CARD, GROUP_KEYS):
        (prepared / name).unlink(missing_ok=True)


def _splits(names: list[str], source: Source) -> dict[str, list[int]]:
    if not source.test:
        return {WHOLE: list(range(len(names)))}
    # The test split does not depend on the size of the validation split, which is chosen from what remains.
    rest, test = _hold_out(list(range(len(names))), names, source.test, source.split_seed, "data.test")
    if not source.validation:
        return {"train": rest, "test": test}
    size = len(test) if source.validation == AS_TEST else source.validation
    size = round(size * len(names)) if size < 1 else size
    train, validation = _hold_out(rest, names, size, source.split_seed, "data.validation")
    return {"train": train, "validation": validation, "test": test}


def _hold_out(
    rows: Sequence[int], names: Sequence[str], size: float, seed: int, field: str
) -> tuple[list[int], list[int]]:
    """Returns (the rows that remain, the rows that are held out)."""
    chosen = groups.split([names[row] for row in rows], size, seed, field)
    return (
        list(itertools.compress(rows, [not held_out for held_out in chosen])),
        list(itertools.compress(rows, chosen)),
    )


def _count(oddities: list[Oddity], *, dropped: bool) -> dict[str, int]:
    return dict(Counter(oddity.kind for oddity in oddities if oddity.dropped == dropped).most_common())


def _list_counts(oddities: list[Oddity]) -> str:
    counts = _count(oddities, dropped=True)
    return "; ".join(f"{kind}: {count}" for kind, count in counts.items()) or "it has no products"


def _fingerprint(products: Sequence[Product], hashes: Sequence[Sequence[str]], splits: Mapping[str, list[int]]) -> str:
    digest = hashlib.sha256()
    for split, rows in splits.items():
        for row in rows:
            p = products[row]
            pixels = hashes[row][0] if len(hashes[row]) == 1 else hashes[row]
            record = [split, p.id, pixels, p.captions, p.category, sorted(p.attributes.items())]
            record += [p.source] * bool(p.source)
            digest.update(json.dumps(record).encode())
    return digest.hexdigest()[:12]
