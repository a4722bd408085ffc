"""Digikala colours: product photos without any text, in one folder per colour."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import folder, layout

SOURCE = "Fetch Digikala's colour classification photos from Kaggle and unpack them into one folder per colour."


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the photos in the order of `folder.read`, without captions: the gallery can be searched, not trained on.

    The name of a photo's folder becomes its attribute `baseColour`. Photos of one colour do not form a group, because
    two red products are not the same product.

    Raises:
      UserError: `path` is not a folder or has no photo, or `columns` is not empty.
    """
    layout.check(path, columns, ["./"], dataset="Digikala's colour photos", source=SOURCE)
    for item in folder.read(path, {}):
        if isinstance(item, Product):
            colour = folder.humanise(item.category.rpartition("/")[2])
            item = replace(item, captions=(), category="", attributes={"baseColour": colour} if colour else {})
        yield item
