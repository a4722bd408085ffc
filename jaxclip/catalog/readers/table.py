"""Any CSV or TSV file with one row per (image, caption) pair, or one row per image in a gallery without captions."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.errors import UserError

USUAL_NAMES = {
    "image": ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "img", "img_path"),
    "caption": ("caption", "text", "title", "name", "description", "productdisplayname", "product_name"),
    "id": ("id", "product_id", "sku", "item_id", "article_id"),
    "category": ("category", "class", "label", "type", "product_type", "subcategory"),
}
"""Role -> column names by which it is recognised, the first that exists; case is ignored, and _ matches space and -."""
MISSING = {"", "NA", "N/A", "<NA>", "nan", "NaN", "None", "null", "NULL"}


@dataclass
class _Entry:
    id: str
    image: str
    captions: list[str]
    values: dict[str, str]


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the oddities of a table, then its products in the order of their first rows.

    `path` is the table, or a folder that contains `metadata.csv` or exactly one table. Image paths are relative to the
    table's folder. Rows with the same id and image become one product with several captions and the
    other values of the first row; if an id occurs again with another image, a number is appended to it. Without an id
    column, the image's path is the id. Columns other than id, image and caption become attributes. A table without a
    caption column is a gallery: its products have no captions, and an oddity reports this.

    Raises:
      UserError: there is no table, the image column or a configured column is missing, a quotation mark is not closed,
        or no row is usable.
    """
    table = _find_table(path)
    entries: dict[tuple[str, str], _Entry] = {}
    ids: set[str] = set()
    roles: dict[str, str] = {}
    for location, values in _rows(table):
        if isinstance(values, str):
            yield Oddity(location, values, dropped=True)
            continue
        if not roles:
            roles = _roles(table, list(values), columns)
            if "caption" not in roles:
                yield Oddity(table.name, "no caption column (set it with data.columns.caption)", dropped=False)
        if any("\ufffd" in value for value in values.values()):
            yield Oddity(location, "broken UTF-8", dropped=False)
        row_values = {
            column: " ".join(value.split()) for column, value in values.items() if value.strip() not in MISSING
        }
        gallery = "caption" not in roles
        image, caption = values[roles["image"]].strip(), "" if gallery else row_values.get(roles["caption"], "")
        problem = _find_problem(image, caption, gallery=gallery)
        if problem:
            yield Oddity(location, problem, dropped=True)
            continue
        id_ = row_values.get(roles["id"], "") if "id" in roles else image
        if not id_:
            yield Oddity(location, "row without an id", dropped=True)
            continue
        entry = entries.get((id_, image))
        if entry:
            if caption and caption not in entry.captions:
                entry.captions.append(caption)
            continue
        unique = _unique(id_, ids)
        if unique != id_:
            yield Oddity(location, "id of another image, made unique by a number", dropped=False)
        ids.add(unique)
        entries[id_, image] = _Entry(unique, image, [caption] if caption else [], row_values)
    if not entries:
        raise UserError(
            f"no row of {table} has an image (and a caption, if the table has a caption column): name the columns with "
            "--config.data.columns.image and --config.data.columns.caption"
        )
    role_columns = {roles.get("id"), roles["image"], roles.get("caption"), ""}
    for entry in entries.values():
        attributes = {column: value for column, value in entry.values.items() if column not in role_columns}
        category = entry.values.get(roles.get("category", ""), "")
        yield Product(entry.id, table.parent / entry.image, tuple(entry.captions), category, attributes)


def _find_table(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a .csv or .tsv file, or its folder.")
    if (path / "metadata.csv").is_file():
        return path / "metadata.csv"
    tables = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in (".csv", ".tsv"))
    if len(tables) != 1:
        found = ", ".join(table.name for table in tables) or "none"
        raise UserError(
            f"{path} should contain exactly one .csv or .tsv file (it contains: {found}): "
            "set --config.data.path to the file of a table."
        )
    return tables[0]


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str] | str]]:
    """Yields (file:line, column -> value) per row; the name of the problem replaces the values of a malformed row."""
    with table.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        first = lines.readline()
        if "\0" in first:
            raise UserError(f"{table} is not UTF-8 text: save it as CSV in UTF-8.")
        delimiter = "\t" if table.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        lines.seek(0)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header, line = None, 1
        try:
            for row in rows:
                if header is None:
                    header = [column.strip() for column in row]
                elif len(row) > len(header):
                    yield f"{table.name}:{line}", "row with too many fields"
                elif row:
                    values = dict(zip(header, row + [""] * (len(header) - len(row)), strict=True))
                    yield f"{table.name}:{line}", values
                line = rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{table}:{line}: {error}; put fields that contain commas, quotes or line breaks in quotes, "
                "and double the quotes inside them."
            ) from error


def _roles(table: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    configured = {role: column for role, column in columns.items() if column}
    for role, column in configured.items():
        flag = f"--config.data.columns.{role}"
        if role not in USUAL_NAMES:
            raise UserError(f"{flag}: {role!r} is not a role of a column: give one of {', '.join(USUAL_NAMES)}.")
        if column not in header:
            raise UserError(f"{table} has no column {column} ({flag}): its columns are {', '.join(header)}.")
    roles = dict(configured)
    by_name = {column.casefold().replace(" ", "_").replace("-", "_"): column for column in reversed(header)}
    for role, names in USUAL_NAMES.items():
        candidates = [by_name[name] for name in names if name in by_name and by_name[name] not in roles.values()]
        if role not in roles and candidates:
            roles[role] = candidates[0]
    if "image" not in roles:
        raise UserError(
            f"{table} has no column that looks like the image: its columns are {', '.join(header)}; "
            "name the column with --config.data.columns.image=NAME."
        )
    return roles


def _find_problem(image: str, caption: str, *, gallery: bool) -> str:
    if image in MISSING:
        return "row without an image"
    if image.startswith(("http://", "https://")):
        return "image is a URL, not a file"
    return "" if caption or gallery else "row without a caption"


def _unique(id_: str, ids: set[str]) -> str:
    unique, number = id_, 1
    while unique in ids:
        number += 1
        unique = f"{id_}-{number}"
    return unique
