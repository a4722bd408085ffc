"""Tar files in the webdataset layout: consecutive files that share their name up to the first dot form a sample."""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.catalog.readers.folder import SUFFIXES
from jaxclip.errors import UserError

TEXTS = (".txt", ".text", ".caption")
USUAL = {"id": (), "caption": ("caption", "text", "title"), "category": ("category", "class")}
"""Role -> the keys of a sample's JSON that may hold it."""
MOST_TEXT = 2**20  # bytes; a larger text or JSON file is read as empty


@dataclass(frozen=True)
class TarMember:
    """A file in an uncompressed tar, addressed by the position of its bytes."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Returns the file's bytes."""
        with self.tar.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)

    def __str__(self) -> str:
        return f"{self.tar.name}: {self.name}"


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the samples of a tar file, or of all `*.tar` in a folder sorted by name, and each oddity.

    A sample's picture is its file with an image suffix. Its captions are the lines of its `.txt`, or the `caption`,
    `text` or `title` of its `.json`. Other JSON values that are text or numbers become attributes. `columns` can name
    other JSON keys for id, caption and category. Pictures are read directly from the tar, without unpacking.

    Raises:
      UserError: there is no tar file, one is compressed or damaged, there is no sample, or `columns` names an image.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"{path} holds no .tar file: give one, or the folder that holds the shards.")
    if columns.get("image"):
        raise UserError("a webdataset finds pictures by their suffix: leave --config.data.columns.image out.")
    seen: set[str] = set()
    for file in files:
        for key, sample in _samples(file):
            found = _product(key, sample, columns)
            if isinstance(found, Product) and found.id in seen:
                found = Oddity(f"{file.name}: {key}", "id a second time", dropped=True)
            if isinstance(found, Product):
                seen.add(found.id)
            yield found
    if not seen:
        raise UserError(f"{path} holds no sample with a picture and a caption: KEY.jpg and KEY.txt would be right.")


def _samples(file: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Yields (key, suffix -> member) for files that follow each other and share their key."""
    try:
        with tarfile.open(file, "r:") as tar:
            key, sample = "", {}
            for member in tar:
                tar.members = []  # tarfile would keep every member in memory
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                here = f"{folder}/{stem}" if folder else stem
                if here != key and sample:
                    yield key, sample
                    sample = {}
                key = here
                sample[(dot + suffix).lower()] = TarMember(file, member.name, member.offset_data, member.size)
            if sample:
                yield key, sample
    except tarfile.TarError as error:
        raise UserError(
            f"{file} is not an uncompressed tar, or is damaged: {error}; unpack a .tar.gz first."
        ) from error


def _product(key: str, sample: Mapping[str, TarMember], columns: Mapping[str, str]) -> Product | Oddity:
    where = str(next(iter(sample.values())))
    picture = next((member for suffix, member in sample.items() if suffix in SUFFIXES), None)
    if picture is None:
        return Oddity(where, "sample without a picture", dropped=True)
    values: dict[str, str] = {}
    if ".json" in sample:
        try:
            found = json.loads(_text(sample[".json"]))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            return Oddity(str(sample[".json"]), "JSON of a sample is no object", dropped=True)
        values = {name: layout.collapse(str(v)) for name, v in found.items() if isinstance(v, str | int | float)}
    lines = [_text(sample[suffix]) for suffix in TEXTS if suffix in sample]
    captions = [layout.collapse(line) for text in lines for line in text.splitlines()]
    captions = captions or [_take(values, "caption", columns)]
    captions = list(dict.fromkeys(filter(None, captions)))
    if not captions:
        return Oddity(where, "sample without a caption", dropped=True)
    id_, category = _take(values, "id", columns) or key, _take(values, "category", columns)
    return Product(id_, picture, tuple(captions), category, {name: value for name, value in values.items() if value})


def _take(values: dict[str, str], role: str, columns: Mapping[str, str]) -> str:
    """Removes the value of a role from `values` and returns it, "" if there is none."""
    named = columns.get(role)
    name = named or next((name for name in USUAL[role] if name in values), "")
    return values.pop(name, "")


def _text(member: TarMember) -> str:
    if member.size > MOST_TEXT:
        return ""
    return member.read().decode("utf-8", errors="replace").removeprefix("\ufeff")
