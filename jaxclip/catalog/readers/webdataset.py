"""Tar files in the webdataset layout: consecutive files with the same path up to the name's first dot are a sample."""

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
USUAL_NAMES = {"id": (), "caption": ("caption", "text", "title"), "category": ("category", "class")}
"""Role -> the keys of a sample's JSON by which it is recognised, the first that exists."""
MAX_TEXT_BYTES = 2**20  # a larger text or JSON file is read as empty


@dataclass(frozen=True)
class TarMember:
    """A file in an uncompressed tar, located by the offset of its bytes."""

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

    A sample's picture is its first file with an image suffix. Its captions are the lines of its `.txt`, `.text` and
    `.caption`, or else the `caption`, `text` or `title` in its `.json`. JSON values that are text or numbers and not
    used as caption, id or category become attributes. `columns` can name other JSON keys for these three. Pictures are
    read directly from the tar, without unpacking it.

    Raises:
      UserError: there is no tar file, a tar file is compressed or damaged, there is no usable sample, or `columns` has
        an image column.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"{path} has no .tar file: give a .tar file, or the folder of the shards.")
    if columns.get("image"):
        raise UserError("the webdataset reader finds pictures by their suffix: leave --config.data.columns.image out.")
    seen: set[str] = set()
    for file in files:
        for key, sample in _samples(file):
            item = _product(key, sample, columns)
            if isinstance(item, Product) and item.id in seen:
                item = Oddity(f"{file.name}: {key}", "duplicate id", dropped=True)
            if isinstance(item, Product):
                seen.add(item.id)
            yield item
    if not seen:
        raise UserError(
            f"{path} has no sample with a picture and a caption: a sample is, for example, KEY.jpg and KEY.txt."
        )


def _samples(file: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Yields (key, suffix -> member) for each run of consecutive files with the same key."""
    try:
        with tarfile.open(file, "r:") as tar:
            key, sample = "", {}
            for member in tar:
                tar.members = []  # otherwise tarfile keeps every member in memory
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                member_key = f"{folder}/{stem}" if folder else stem
                if member_key != key and sample:
                    yield key, sample
                    sample = {}
                key = member_key
                sample[(dot + suffix).lower()] = TarMember(file, member.name, member.offset_data, member.size)
            if sample:
                yield key, sample
    except tarfile.TarError as error:
        raise UserError(
            f"{file} is not an uncompressed tar or is damaged: {error}; decompress a .tar.gz first."
        ) from error


def _product(key: str, sample: Mapping[str, TarMember], columns: Mapping[str, str]) -> Product | Oddity:
    location = str(next(iter(sample.values())))
    picture = next((member for suffix, member in sample.items() if suffix in SUFFIXES), None)
    if picture is None:
        return Oddity(location, "sample without a picture", dropped=True)
    values: dict[str, str] = {}
    if ".json" in sample:
        try:
            content = json.loads(_text(sample[".json"]))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            return Oddity(str(sample[".json"]), "sample's JSON is not an object", dropped=True)
        values = {name: layout.collapse(str(v)) for name, v in content.items() if isinstance(v, str | int | float)}
    lines = [_text(sample[suffix]) for suffix in TEXTS if suffix in sample]
    captions = [layout.collapse(line) for text in lines for line in text.splitlines()]
    captions = captions or [_pop_role(values, "caption", columns)]
    captions = list(dict.fromkeys(filter(None, captions)))
    if not captions:
        return Oddity(location, "sample without a caption", dropped=True)
    id_, category = _pop_role(values, "id", columns) or key, _pop_role(values, "category", columns)
    return Product(id_, picture, tuple(captions), category, {name: value for name, value in values.items() if value})


def _pop_role(values: dict[str, str], role: str, columns: Mapping[str, str]) -> str:
    """Removes the value of a role from `values` and returns it; returns "" if there is none."""
    name = columns.get(role) or next((name for name in USUAL_NAMES[role] if name in values), "")
    return values.pop(name, "")


def _text(member: TarMember) -> str:
    if member.size > MAX_TEXT_BYTES:
        return ""
    return member.read().decode("utf-8", errors="replace").removeprefix("\ufeff")
