"""Fashion Product Images (Param Aggarwal, Kaggle), in both of its layouts.

The small layout has `styles.csv` and `images/ID.jpg`; the full layout also has `styles/ID.json`, which adds pattern and
material.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.errors import UserError

NAME = "productDisplayName"
MISSING = ("", "NA")
NAME_SOURCES = ("gender", "baseColour", "articleType")
DETAILS = {
    "pattern": ("Pattern", "Print or Pattern Type", "Pattern Type", "Top Pattern"),
    "materialType": ("Fabric", "Fabric Type", "Material", "Material Type", "Top Fabric", "Saree Fabric"),
}
"""Attribute -> possible keys in `articleAttributes` of a JSON file; the first key with a value is used."""


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the catalogue's products in the order of `styles.csv`, and each oddity where it occurs.

    The category is `subCategory`. Attributes keep the dataset's names; `pattern` and `materialType` come from
    `styles/ID.json`, which also supplies values that the row lacks. If both lack the name, it is built from gender,
    colour and article type; a product that lacks the article type too is dropped. White space in values is stripped
    and collapsed, but an id is kept as it is written. A row whose id repeats has the same photo and is dropped.

    Raises:
      UserError: the folder, `styles.csv`, `images/` or a required column is missing, there are no products, or
        `columns` is not empty.
    """
    table = _check_layout(path, columns)
    details = path / "styles"
    has_details = details.is_dir()
    seen: set[str] = set()
    with table.open("rb") as lines:
        header = _header(lines.readline(), table)
        id_column, name_column = header.index("id"), header.index(NAME)
        for number, raw in enumerate(lines, start=2):
            line = _decode(raw)
            if not line:
                continue
            location = f"{table.name}:{number}"
            if "\ufffd" in line:
                yield Oddity(location, "broken UTF-8", dropped=False)
            fields = split_row(line, len(header), name_column)
            if fields is None:
                yield Oddity(location, "row with too few fields", dropped=True)
                continue
            row = dict(zip(header, (" ".join(field.split()) for field in fields), strict=True))
            row = {column: value for column, value in row.items() if column and value not in MISSING}
            id_ = fields[id_column]
            stem = id_.strip() if row.pop("id", "") else ""
            if not stem or stem in seen:
                yield Oddity(location, "duplicate id" if stem else "row without an id", dropped=True)
                continue
            seen.add(stem)
            if has_details:
                added = _details(details / f"{stem}.json")
                if isinstance(added, str):
                    yield Oddity(f"styles/{stem}.json", added, dropped=False)
                else:
                    if NAME in added and NAME not in row:
                        yield Oddity(location, "no name, taken from its JSON file", dropped=False)
                    row = added | row
            name, oddity = _name(row, location)
            if oddity:
                yield oddity
            if name:
                row.pop(NAME, None)
                yield Product(id_, (path / "images" / f"{stem}.jpg",), (name,), row.get("subCategory", ""), row)
    if not seen:
        raise UserError(f"{table} has no products: it should have a header and one row for each product.")


def split_row(line: str, count: int, name: int) -> list[str] | None:
    """Returns the `count` fields of a row, or None if there are too few.

    Rows are not quoted as in CSV: quotation marks are text, and the name, at index `name`, may contain commas, so
    surplus commas are taken as part of it. A row that has `count` fields when it is read as quoted CSV is read so.
    """
    if '"' in line:
        try:
            quoted = next(csv.reader([line], strict=True), [])
        except csv.Error:
            quoted = []
        if len(quoted) == count:
            return quoted
    fields = line.split(",")
    surplus = len(fields) - count
    if surplus < 0:
        return None
    return [*fields[:name], ",".join(fields[name : name + surplus + 1]), *fields[name + surplus + 1 :]]


def _check_layout(path: Path, columns: Mapping[str, str]) -> Path:
    if any(columns.values()):
        raise UserError("the fashion_product_images layout has fixed columns: leave --config.data.columns out.")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a folder with styles.csv and images/ID.jpg.")
    table = path / "styles.csv"
    if not table.is_file():
        nested = sorted(path.glob("*/styles.csv"))
        hint = f"did you mean {nested[0].parent}?" if nested else "give a folder with styles.csv and images/ID.jpg."
        raise UserError(f"{path} has no styles.csv: {hint}")
    if not (path / "images").is_dir():
        archives = sorted(path.glob("images.*"))
        hint = f"unpack {archives[0].name} there." if archives else "the photos should be images/ID.jpg."
        raise UserError(f"{path} has no folder images/: {hint}")
    return table


def _header(raw: bytes, table: Path) -> list[str]:
    header = [column.strip() for column in next(csv.reader([_decode(raw.removeprefix(b"\xef\xbb\xbf"))]), [])]
    missing = [column for column in ("id", NAME) if column not in header]
    if missing:
        columns = ", ".join(header) or "none"
        raise UserError(f"{table} has no column {' and no column '.join(missing)}: its columns are {columns}.")
    return header


def _decode(raw: bytes) -> str:
    return raw.rstrip(b"\r\n").decode("utf-8", errors="replace")


def _name(row: Mapping[str, str], location: str) -> tuple[str, Oddity | None]:
    if NAME in row:
        return row[NAME], None
    if "articleType" not in row:
        return "", Oddity(location, "no name and no article type", dropped=True)
    name = " ".join(row[source] for source in NAME_SOURCES if source in row)
    return name, Oddity(location, "no name, built from attributes", dropped=False)


def _details(path: Path) -> dict[str, str] | str:
    """Returns the attributes in a product's JSON file, or the kind of oddity if the file is missing or broken."""
    try:
        data = json.loads(path.read_bytes())["data"]
        article = data.get("articleAttributes") or {}
        values = {key: data.get(key) for key in (NAME, "gender", "baseColour", "season", "year", "usage")}
        for key in ("masterCategory", "subCategory", "articleType"):
            values[key] = (data.get(key) or {}).get("typeName")
        for attribute, keys in DETAILS.items():
            values[attribute] = _first(article, keys)
    except FileNotFoundError:
        return "JSON file missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "broken JSON file"
    texts = {key: " ".join(str(value).split()) for key, value in values.items() if isinstance(value, str | int)}
    return {key: text for key, text in texts.items() if text not in MISSING}


def _first(values: Mapping[str, object], keys: Sequence[str]) -> object:
    return next((values[key] for key in keys if values.get(key) not in (None, *MISSING)), None)
