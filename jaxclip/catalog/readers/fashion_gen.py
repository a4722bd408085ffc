"""Fashion-Gen (Rostamzadeh et al. 2018): photos and texts in HDF5 files; photos are read one row at a time."""

import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.errors import UserError

SOURCE = (
    "Request access at https://fashion-gen.com and put fashiongen_256_256_train.h5, fashiongen_256_256_validation.h5 "
    "or both into it."
)
IMAGE, TEXT, CATEGORY, ARTICLE = "input_image", "input_description", "input_category", "input_productID"
ATTRIBUTES = {
    "input_name": "name",
    "input_subcategory": "subCategory",
    "input_gender": "gender",
    "input_brand": "brand",
    "input_composition": "materialType",
    "input_season": "season",
    "input_department": "department",
    "input_pose": "view",
}
"""HDF5 dataset -> the attribute under which its values are stored."""
GROUP = "article-"
"""What the group of a row starts with; the product id follows."""
BLOCK = 4096  # rows of text per read


@dataclass(frozen=True)
class HDF5Image:
    """The picture in one row of an HDF5 dataset of uint8 pictures, (rows, height, width, 3)."""

    file: Path
    dataset: str
    row: int
    size: int

    def read(self) -> bytes:
        """Returns the picture as PNG."""
        with h5py.File(self.file, "r") as opened:
            pixels = np.asarray(opened[self.dataset][self.row])
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, "PNG", compress_level=1)
        return encoded.getvalue()

    def __str__(self) -> str:
        return f"{self.file.name}: {self.dataset}[{self.row}]"


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the products of an HDF5 file, or of all `*.h5` in a folder sorted by name, and each oddity.

    Rows with one product id, in any place and file, are one product, which is yielded after its last row. The captions
    are the descriptions without HTML line breaks. The attribute `partition` is the end of the name of the file with the
    first row, such as train in `fashiongen_256_256_train.h5`. A row without a product id is a product of its own.

    With `unit` = "photo", each row is a product, with its pose as the attribute `view`, and rows with the same product
    id are one group.

    Raises:
      UserError: there is no file, a file is not HDF5 or lacks the pictures or descriptions, or `columns` is not empty.
    """
    layout.check(path, columns, [], dataset="Fashion-Gen", source=SOURCE)
    files = [path] if path.is_file() else sorted(path.glob("*.h5"))
    if not files:
        raise UserError(f"{path} is not a copy of Fashion-Gen: it has no .h5 file. {SOURCE}")
    rows = (row for file in files for row in _rows(file))
    if unit == "article":
        yield from layout.articles(map(_of_article, rows), Counter(id_ for file in files for id_ in _articles(file)))
        return
    for row in rows:
        yield row if row.captions else _without_description(row)


def _of_article(row: Product) -> Product | Oddity:
    """Returns a row as a photo for `layout.articles`: its group is its product's id."""
    article = row.group.removeprefix(GROUP)
    return replace(row, group=article) if article or row.captions else _without_description(row)


def _without_description(row: Product) -> Oddity:
    picture = row.pictures[0]
    return Oddity(f"{picture.file.name}: row {picture.row}", "row without a description", dropped=True)


def _articles(file: Path) -> Iterator[str]:
    """Yields the product id of each row; nothing if the file has none."""
    with _open(file) as opened:
        if ARTICLE in opened:
            yield from map(_id, opened[ARTICLE][:].reshape(-1))


def _open(file: Path) -> h5py.File:
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise UserError(f"{file} is not an HDF5 file or is truncated: {error}.") from error


def _rows(file: Path) -> Iterator[Product]:
    """Yields each row as a product, without captions if it has no description."""
    partition = file.stem.rpartition("_")[2]
    with _open(file) as opened:
        missing = [name for name in (IMAGE, TEXT) if name not in opened]
        if missing:
            raise UserError(f"{file} has no dataset {' and '.join(missing)}: it has {', '.join(sorted(opened))}.")
        present = [name for name in (TEXT, CATEGORY, ARTICLE, *ATTRIBUTES) if name in opened]
        texts = [name for name in present if name != ARTICLE]
        total = len(opened[IMAGE])
        size = math.prod(opened[IMAGE].shape[1:])  # bytes of the raw pixels; a PNG is usually smaller
        for start in range(0, total, BLOCK):
            block = {name: opened[name][start : start + BLOCK].reshape(-1) for name in present}
            for offset in range(min(BLOCK, total - start)):
                row = start + offset
                values = {name: _text(block[name][offset]) for name in texts}
                attributes = {ours: values[name] for name, ours in ATTRIBUTES.items() if values.get(name)}
                article = _id(block[ARTICLE][offset]) if ARTICLE in block else ""
                yield Product(
                    f"{partition}-{row}",
                    (HDF5Image(file, IMAGE, row, size),),
                    (values[TEXT],) if values[TEXT] else (),
                    values.get(CATEGORY, ""),
                    {**attributes, "partition": partition},
                    GROUP + article if article else "",
                )


def _id(value: bytes | np.generic) -> str:
    """Returns a product id, which is Latin-1 bytes or a number, as text; "" if it is blank."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return text if text.strip() else ""


def _text(value: bytes | np.generic) -> str:
    """Returns a value, which is Latin-1 bytes or a number, as text without HTML line breaks."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return layout.collapse(text.replace("<br>", " ").replace("<br/>", " "))
