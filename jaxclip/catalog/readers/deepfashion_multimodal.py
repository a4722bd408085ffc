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
"""Attribute -> the meanings of its numbers; a number beyond the last means that the part is not visible."""
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
    """Yields the photos of `captions.json` in file order, and the oddities.

    Photos of one article are one group, and its category is in the file name, as in
    `WOMEN-Dresses-id_00000002-02_1_front.jpg`. Attributes come from the files of `labels/` that exist; a part
    labelled as not visible has no attribute.

    Raises:
      UserError: `captions.json` or `images/` is missing or unreadable, or `columns` is not empty.
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
        named = _NAME.fullmatch(Path(file).stem)
        if named is None:
            yield Oddity(f"captions.json: {file}", "name does not tell article and category", dropped=False)
        parts = named.groupdict() if named else {}
        attributes = {name: parts[name] for name in ("gender", "view") if name in parts} | labels.get(file, {})
        category = parts.get("category", "").replace("_", " ")
        yield Product(Path(file).stem, path / "images" / file, (text,), category, attributes, parts.get("item", ""))
    if not captions:
        raise UserError(f"{path / 'captions.json'} holds no captions.")


def _read_labels(file: Path, meanings: Mapping[str, Sequence[str]], labels: dict[str, dict[str, str]]):
    """Adds the labels in a file to each photo's attributes in `labels`; yields malformed rows as oddities."""
    rows: list[tuple[str, list[int]]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        photo, *values = line.split() or [""]
        if not photo:
            continue
        if len(values) != len(meanings) or not all(value.isdigit() for value in values):
            yield Oddity(f"{file.name}:{number}", f"row without {len(meanings)} numbers", dropped=False)
            continue
        rows.append((photo, [int(value) for value in values]))
    # The documentation skips neckline number 3. A file that uses 3 is numbered without that gap.
    gap = meanings is SHAPES and not any(values[NECKLINE] == 3 for _, values in rows)
    for photo, values in rows:
        if gap and values[NECKLINE] > 3:
            values[NECKLINE] -= 1
        known = {name: kinds[v] for (name, kinds), v in zip(meanings.items(), values, strict=True) if v < len(kinds)}
        labels.setdefault(photo, {}).update(known)
