"""DeepFashion-MultiModal (Jiang et al. 2022): captioned photos of people, with labels of shape and fabric."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.errors import UserError

SOURCE = (
    "Fetch it from https://github.com/yumingj/DeepFashion-MultiModal and put captions.json, images/ and, for "
    "attributes, labels/ (shape/shape_anno_all.txt, texture/fabric_ann.txt, texture/pattern_ann.txt) into it."
)
SHAPES = {
    "sleeveLength": ("sleeveless", "short-sleeve", "medium-sleeve", "long-sleeve", "not long-sleeve"),
    "lowerLength": ("three-point", "medium short", "three-quarter", "long"),
    "socks": ("no", "socks", "leggings"),
    "hat": ("no", "yes"),
    "glasses": ("no", "eyeglasses", "sunglasses", "in hand or clothes"),
    "neckwear": ("no", "yes"),
    "wristWearing": ("no", "yes"),
    "ring": ("no", "yes"),
    "waistAccessory": ("no", "belt", "clothing", "hidden"),
    "neckline": ("V-shape", "square", "round", "standing", "lapel", "suspenders"),
    "cardigan": ("yes", "no"),
    "coversNavel": ("no", "yes"),
}
"""Attribute -> the meanings of the numbers 0, 1, ...; a larger number means that the part is not visible."""
NECKLINE = list(SHAPES).index("neckline")
FABRICS = ("denim", "cotton", "leather", "furry", "knitted", "chiffon", "other")
PATTERNS = ("floral", "graphic", "striped", "pure color", "lattice", "other", "color block")
PARTS = ("upper", "lower", "outer")
LABELS = {
    "shape/shape_anno_all.txt": SHAPES,
    "texture/fabric_ann.txt": {f"{part}Fabric": FABRICS for part in PARTS},
    "texture/pattern_ann.txt": {f"{part}Pattern": PATTERNS for part in PARTS},
}
_NAME = re.compile(r"(?P<item>(?P<gender>[^-]+)-(?P<category>.+)-id_\d+)-\d+_\d+_(?P<view>\w+)")


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the articles with all photos and captions that `captions.json` has of them, and the oddities before them.

    Articles are in the order of their first photos. Article, category and gender come from the file name: the article
    of `WOMEN-Dresses-id_00000002-02_1_front.jpg` is WOMEN-Dresses-id_00000002. Other attributes come from the files in
    `labels/` that exist, each from the first photo that has it; a part that is labelled as not visible has none.
    A photo whose file name has no article is a product of its own.

    With `unit` = "photo", each photo is a product, in the order of the file, with its own caption and attributes, among
    them `view`. Photos of one article are then one group.

    Raises:
      UserError: `captions.json` or `images/` is missing, the captions are malformed, or `columns` is not empty.
    """
    layout.check(path, columns, ["captions.json", "images/"], dataset="DeepFashion-MultiModal", source=SOURCE)
    try:
        captions = json.loads(layout.read_text(path / "captions.json"))
    except ValueError as error:
        raise UserError(f"{path / 'captions.json'} is not JSON: {error}.") from error
    if not isinstance(captions, dict):
        raise UserError(f"{path / 'captions.json'} should map the name of each photo to its caption.")
    labels: dict[str, dict[str, str]] = {}
    for name, meanings in LABELS.items():
        if (path / "labels" / name).is_file():
            yield from _read_labels(path / "labels" / name, meanings, labels)
    photos = _photos(captions, labels, path / "images", unit)
    yield from photos if unit == "photo" else layout.articles(photos)
    if not captions:
        raise UserError(f"{path / 'captions.json'} has no captions: give the whole dataset")


def _photos(
    captions: Mapping[str, object], labels: Mapping[str, Mapping[str, str]], images: Path, unit: str
) -> Iterator[Product | Oddity]:
    """Yields the photos; those of an article may lack a caption if `unit` is "article"."""
    for file, caption in captions.items():
        text = layout.collapse(caption) if isinstance(caption, str) else ""
        match = _NAME.fullmatch(Path(file).stem)
        if not text and (unit == "photo" or match is None):
            yield Oddity(f"captions.json: {file}", "photo without a caption", dropped=True)
            continue
        if match is None:
            yield Oddity(f"captions.json: {file}", "file name without article and category", dropped=False)
        parts = match.groupdict() if match else {}
        attributes = {name: parts[name] for name in ("gender", "view") if name in parts} | dict(labels.get(file, {}))
        category = parts.get("category", "").replace("_", " ")
        texts = (text,) if text else ()
        yield Product(Path(file).stem, (images / file,), texts, category, attributes, parts.get("item", ""))


def _read_labels(file: Path, meanings: Mapping[str, Sequence[str]], labels: dict[str, dict[str, str]]):
    """Adds the labels in a file to the attributes of each photo in `labels`; yields an oddity per malformed row."""
    rows: list[tuple[str, list[int]]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        photo, *values = line.split() or [""]
        if not photo:
            continue
        if len(values) != len(meanings) or not all(value.isdigit() for value in values):
            yield Oddity(f"{file.name}:{number}", f"row without {len(meanings)} numbers", dropped=False)
            continue
        rows.append((photo, [int(value) for value in values]))
    # The documentation numbers necklines without 3; a file that has a 3 is numbered without this gap.
    gap = meanings is SHAPES and not any(values[NECKLINE] == 3 for _, values in rows)
    for photo, values in rows:
        if gap and values[NECKLINE] > 3:
            values[NECKLINE] -= 1
        attributes = {
            name: kinds[v] for (name, kinds), v in zip(meanings.items(), values, strict=True) if v < len(kinds)
        }
        labels.setdefault(photo, {}).update(attributes)
