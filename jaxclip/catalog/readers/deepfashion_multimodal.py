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


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the photos of `captions.json` in file order, and each oddity where it occurs.

    Photos of one article are one group. Article, category, gender and view come from the file name, such as
    `WOMEN-Dresses-id_00000002-02_1_front.jpg`, and other attributes from the files in `labels/` that exist; a part that
    is labelled as not visible has no attribute.

    Raises:
      UserError: `captions.json` or `images/` is missing, the captions are malformed, or `columns` is not empty.
    """
    layout.check(path, columns, ["captions.json", "images/"], dataset="DeepFashion-MultiModal", source=SOURCE)
    try:
        captions = json.loads((path / "captions.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'captions.json'} is not JSON: {error}.") from error
    if not isinstance(captions, dict):
        raise UserError(f"{path / 'captions.json'} should map the name of each photo to its caption.")
    labels: dict[str, dict[str, str]] = {}
    for name, meanings in LABELS.items():
        if (path / "labels" / name).is_file():
            yield from _read_labels(path / "labels" / name, meanings, labels)
    for file, caption in captions.items():
        text = layout.collapse(caption) if isinstance(caption, str) else ""
        if not text:
            yield Oddity(f"captions.json: {file}", "photo without a caption", dropped=True)
            continue
        match = _NAME.fullmatch(Path(file).stem)
        if match is None:
            yield Oddity(f"captions.json: {file}", "file name without article and category", dropped=False)
        parts = match.groupdict() if match else {}
        attributes = {name: parts[name] for name in ("gender", "view") if name in parts} | labels.get(file, {})
        category = parts.get("category", "").replace("_", " ")
        yield Product(Path(file).stem, path / "images" / file, (text,), category, attributes, parts.get("item", ""))
    if not captions:
        raise UserError(f"{path / 'captions.json'} has no captions: give the whole dataset")


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
