"""What a reader yields: products, and the oddities that it finds in the catalogue."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Embedded(Protocol):
    """A picture inside a larger file (HDF5, tar, TFDS), which is read on demand and never cached."""

    @property
    def size(self) -> int:
        """The approximate number of bytes that `read` returns, known without reading."""
        ...

    def read(self) -> bytes:
        """Returns the encoded picture; raises OSError if it cannot be read."""
        ...

    def __str__(self) -> str:
        """Returns the location as a user would look it up."""
        ...


@dataclass(frozen=True)
class Product:
    """One product photo and what its catalogue says about it.

    Attributes:
      id: unique in its catalogue.
      image: the encoded picture; it may be missing or unreadable.
      captions: queries that describe the product; the first is its name. Products of a gallery without text have none.
      category: the name by which metrics are grouped, "" if unknown.
      attributes: the catalogue's own columns under their own names; a missing value is absent, never "" or "NA".
      group: products of one group are equally relevant to a query, and a split never divides a group. Readers set it
        if the catalogue says which photos show the same article; `catalog.groups` determines the rest.
    """

    id: str
    image: Path | Embedded
    captions: tuple[str, ...]
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def title(self) -> str:
        """The first caption, or the id if there are no captions."""
        return self.captions[0] if self.captions else self.id


@dataclass(frozen=True)
class Oddity:
    """A defect in a catalogue, and whether the product was dropped because of it.

    Attributes:
      where: the file, row or id, as a user would look it up.
      what: the kind of oddity, always in the same words, so that kinds can be counted.
      dropped: True if the product was left out, False if it was mended and kept.
    """

    where: str
    what: str
    dropped: bool


Reader = Callable[[Path, Mapping[str, str]], Iterator[Product | Oddity]]
"""`read(path, columns)`: the products of a raw catalogue, lazily, in a fixed order. `columns` maps a role (id, image,
caption, category) to the catalogue's own column name, for readers that let the user say so."""
