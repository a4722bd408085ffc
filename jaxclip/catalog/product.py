"""The types that readers yield: products, and oddities (defects) of the catalogue."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Embedded(Protocol):
    """A picture inside a larger file (HDF5, tar, TFDS), read on demand and never cached."""

    @property
    def size(self) -> int:
        """The approximate number of bytes that `read` will return; obtaining it reads nothing."""
        ...

    def read(self) -> bytes:
        """Returns the encoded picture; raises OSError if it cannot be read."""
        ...

    def __str__(self) -> str:
        """Returns the location of the picture, for messages."""
        ...


@dataclass(frozen=True)
class Product:
    """What a searcher finds: a product with its pictures and the catalogue's data about it.

    Attributes:
      id: the catalogue's own string. If a reader gives it to several products, `catalog.ids` numbers the later ones.
      pictures: the encoded pictures, at least one, the main picture first; any may be missing or unreadable.
      captions: queries that describe the product; the first serves as its name. Empty in a gallery without text.
      category: the category by which metrics are grouped, "" if unknown.
      attributes: name -> value of the catalogue's other data about the product; a missing value is absent, never "".
      group: products of one group are equally relevant to a query, and a split never divides a group. Readers set it
        if the catalogue states which products are the same article, and leave it "" otherwise; `catalog.groups`
        computes the final groups.
      roles: the role of each picture in the catalogue's own image-to-image evaluation, "query" or "gallery" ("" for
        neither); empty if the catalogue has none.
      source: the name of the catalogue that the product is from, if several are prepared as one; "" otherwise.
    """

    id: str
    pictures: tuple[Path | Embedded, ...]
    captions: tuple[str, ...]
    category: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    roles: tuple[str, ...] = ()
    source: str = ""

    @property
    def title(self) -> str:
        """The first caption, or the id if there are no captions."""
        return self.captions[0] if self.captions else self.id


def picture_name(location: Path | Embedded) -> str:
    """Returns the name of a picture: the name of its file, or what an embedded picture calls itself."""
    return location.name if isinstance(location, Path) else str(getattr(location, "name", location))


@dataclass(frozen=True)
class Oddity:
    """A defect in a catalogue, and whether a product or file was dropped because of it.

    Attributes:
      location: the file, row or id at which a user finds it.
      kind: the kind of oddity; a kind always has the same words, so that it can be counted.
      dropped: True if a product or file was left out, False if the defect was mended or ignored.
    """

    location: str
    kind: str
    dropped: bool


UNITS = ("article", "photo")
AS_TEST = -1.0
"""Size of a validation split that is as large as the test split."""

Reader = Callable[[Path, Mapping[str, str], str], Iterator[Product | Oddity]]
"""`read(path, columns, unit)` yields the products and the oddities of a raw catalogue, in a fixed order.

`unit` is one of UNITS: whether a product is an article with all its photos, or each photo with its own captions is a
product and photos of one article are one group, as papers count. It makes no difference to layouts of one photo per
article.

`columns` maps roles (id, product, image, caption, category) to the catalogue's names of columns, features or keys, for
readers for which they can be configured; other readers raise UserError if it names any.
"""
