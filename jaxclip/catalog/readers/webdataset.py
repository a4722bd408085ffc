"""Tar files in the webdataset layout: consecutive files with the same path up to the name's first dot are a sample."""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.catalog.readers.folder import SUFFIXES
from jaxclip.errors import UserError

TEXTS = (".txt", ".text", ".caption")
USUAL_NAMES = {"caption": ("caption", "text", "title"), "category": ("category", "class")}
"""Role -> the keys of a sample's JSON by which it is recognised, the first that exists; an id has none."""
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


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the samples of a tar file, or of all `*.tar` in a folder sorted by name, and each oddity.

    A sample's pictures are its files with an image suffix, with or without a number (`.jpg`, `.png`, `.0.jpg`,
    `.1.jpg`), in the order of numbers and names. Its captions are the lines of its `.txt`, `.text` and `.caption`, or
    else the `caption`, `text` or `title` in its `.json`. Its id is the `id` that `columns` names in its JSON, or else
    its key. JSON values that are text or numbers and not used as caption, id or category become attributes. `columns`
    can name other JSON keys for these three. Pictures are read directly from the tar, without unpacking it.

    With `unit` = "photo", each picture is a product. Those of one sample have the same captions, are one group, and
    have the suffix at the end of their ids, such as KEY.1.jpg.

    Raises:
      UserError: there is no tar file, a tar file is compressed or damaged, there is no usable sample, or `columns` has
        an image or a product column.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.tar"))
    if not files:
        raise UserError(f"{path} has no .tar file: give a .tar file, or the folder of the shards.")
    if columns.get("image"):
        raise UserError("the webdataset reader finds pictures by their suffix: leave --config.data.columns.image out.")
    if columns.get("product"):
        raise UserError("a sample of a webdataset is one product: leave --config.data.columns.product out.")
    empty = True
    for file in files:
        for key, sample in _samples(file):
            pictures = _pictures(sample)
            item = _product(key, sample, list(pictures.values()), columns)
            if isinstance(item, Oddity):
                yield item
                continue
            empty = False
            yield from layout.each_photo(item, list(pictures), f"{file.name}: {key}") if unit == "photo" else [item]
    if empty:
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


def _pictures(sample: Mapping[str, TarMember]) -> dict[str, TarMember]:
    """Returns suffix -> picture, in order; other suffixes, such as .mask.png, are no pictures of the product."""
    found = []
    for suffix in sample:
        number, dot, ending = suffix.removeprefix(".").rpartition(".")
        if "." + ending in SUFFIXES and (not dot or number.isdecimal()):
            found.append((int(number or -1), suffix))
    return {suffix: sample[suffix] for _, suffix in sorted(found)}


def _product(
    key: str, sample: Mapping[str, TarMember], pictures: Sequence[TarMember], columns: Mapping[str, str]
) -> Product | Oddity:
    location = str(next(iter(sample.values())))
    if not pictures:
        return Oddity(location, "sample without a picture", dropped=True)
    id_, values = key, {}
    if ".json" in sample:
        try:
            content = json.loads(_text(sample[".json"]))
        except ValueError:
            content = None
        if not isinstance(content, dict):
            return Oddity(str(sample[".json"]), "sample's JSON is not an object", dropped=True)
        texts = {name: str(value) for name, value in content.items() if isinstance(value, str | int | float)}
        values = {name: layout.collapse(text) for name, text in texts.items()}
        name = columns.get("id", "")
        id_ = texts[name] if values.pop(name, "") else key
    lines = [_text(sample[suffix]) for suffix in TEXTS if suffix in sample]
    captions = [layout.collapse(line) for text in lines for line in text.splitlines()]
    captions = captions or [_pop_role(values, "caption", columns)]
    captions = list(dict.fromkeys(filter(None, captions)))
    if not captions:
        return Oddity(location, "sample without a caption", dropped=True)
    category = _pop_role(values, "category", columns)
    attributes = {name: value for name, value in values.items() if value}
    return Product(id_, tuple(pictures), tuple(captions), category, attributes)


def _pop_role(values: dict[str, str], role: str, columns: Mapping[str, str]) -> str:
    """Removes the value of a role from `values` and returns it; returns "" if there is none."""
    name = columns.get(role) or next((name for name in USUAL_NAMES[role] if name in values), "")
    return values.pop(name, "")


def _text(member: TarMember) -> str:
    if member.size > MAX_TEXT_BYTES:
        return ""
    return member.read().decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")
