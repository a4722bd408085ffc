"""What a reader yields: a product, or an oddity it met on the way."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Embedded(Protocol):
    """A picture that lies inside a larger file (HDF5, tar, TFDS). It is read when it is asked for and never kept."""

    @property
    def size(self) -> int:
        """About how many bytes `read` will take, known without reading."""
        ...

    def read(self) -> bytes:
        """Returns the encoded picture; OSError where it cannot be read."""
        ...

    def __str__(self) -> str:
        """Returns where it lies, as a user would look it up."""
        ...


@dataclass(frozen=True)
class Product:
    """One product photo and what its catalogue says of it.

    Attributes:
      id: unique in its catalogue.
      image: the encoded picture; it may turn out to be missing or unreadable.
      captions: what a searcher could type; the first one is the product's name. A gallery of pictures alone has none.
      category: the name by which metrics are grouped, "" where unknown.
      attributes: the catalogue's own columns under their own names; a missing value is absent, never "" or "NA".
      group: products of one group are the same thing to a searcher. It decides relevance, and a split never divides
        it. Readers fill it where the catalogue itself says which photos show one article; `catalog.groups` finds the
        others.
    """

    id: str
    image: Path | Embedded
    captions: tuple[str, ...]
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def title(self) -> str:
        """The first caption, or the id where there is none."""
        return self.captions[0] if self.captions else self.id


@dataclass(frozen=True)
class Oddity:
    """Something in a catalogue that is not as it should be, and whether it cost the product.

    Attributes:
      where: the file, row or id, as a user would look it up.
      what: the kind of oddity, the same words for the same kind, so that kinds can be counted.
      dropped: True if the product was left out, False if it was mended and kept.
    """

    where: str
    what: str
    dropped: bool


Reader = Callable[[Path, Mapping[str, str]], Iterator[Product | Oddity]]
"""`read(path, columns)`: the products of a raw catalogue, lazily, in a fixed order. `columns` maps a role (id, image,
caption, category) to the catalogue's own column name, for readers that let the user say so."""
