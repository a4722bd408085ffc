"""Digikala colours: product photos in one folder for each colour, without a word of text."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import folder, layout

SOURCE = "Fetch Digikala's colour classification photos from Kaggle and unpack them: one folder of photos a colour."


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the photos sorted by path: a gallery without captions, to be searched and not to be trained on.

    The folder's name is the attribute `baseColour`. Photos of a colour are no group: being red does not make two
    products the same.

    Raises:
      UserError: `path` is not a folder or holds no photo, or `columns` is not empty.
    """
    layout.check(path, columns, ["./"], dataset="folder of Digikala photos", source=SOURCE)
    for found in folder.read(path, {}):
        if isinstance(found, Product):
            colour = folder.humanise(found.category.rpartition("/")[2])
            found = replace(found, captions=(), category="", attributes={"baseColour": colour} if colour else {})
        yield found
