"""Writes drawn products to a folder in the small layout of Fashion Product Images."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxclip.catalog.drawn.stock import draw_product
from jaxclip.errors import UserError

COLUMNS = (
    "id",
    "gender",
    "masterCategory",
    "subCategory",
    "articleType",
    "baseColour",
    "season",
    "year",
    "usage",
    "productDisplayName",
)


def _silently(indices: Iterable[Any]) -> Iterable[Any]:
    return indices


def draw_catalogue(
    folder: Path, products: int, seed: int, progress: Callable[[Iterable], Iterable] = _silently
) -> None:
    """Writes styles.csv, images/ID.jpg and truth.json for `products` products into the new `folder`.

    Product i depends only on `seed` and i, so a larger catalogue begins with the smaller one. Before JPEG
    compression, its pixels are the same on every machine. truth.json maps each id to the place of the product (`box`:
    left, top, width and height in pixels), the boxes and colours of its `parts` (name and RGB before shading), its
    `pattern` with `pattern_colour` (null if it is plain), and the kind of `background`.

    The folder appears only when it is complete: until then, files are written to a temporary sibling folder.

    Args:
      folder: must be empty or not exist yet; missing parents are created.
      products: the number of products, at least 1.
      seed: any integer.
      progress: wraps the products while they are drawn, as `tqdm` does.

    Raises:
      UserError: `folder` is not empty, or `products` is less than 1.
    """
    if products < 1:
        raise UserError(f"a drawn catalogue needs at least 1 product, not {products}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give a new or empty folder for the drawn catalogue.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        (partial / "images").mkdir(parents=True)
        _write(partial, products, seed, progress)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, products: int, seed: int, progress: Callable[[Iterable], Iterable]) -> None:
    truth = {}
    with (folder / "styles.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for index in progress(range(products)):
            drawing = draw_product(seed, index)
            table.writerow(drawing.row)
            truth[drawing.row["id"]] = drawing.truth
            picture = Image.fromarray(drawing.canvas.pixels.astype(np.uint8))
            # Quality and subsampling are explicit, so that the bytes do not depend on the defaults of a Pillow version.
            picture.save(folder / "images" / f"{drawing.row['id']}.jpg", quality=90, subsampling=0, optimize=False)
    lines = ",\n".join(f"{json.dumps(product)}: {json.dumps(entry)}" for product, entry in truth.items())
    (folder / "truth.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
