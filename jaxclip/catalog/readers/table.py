"""Any CSV or TSV file with one row per (image, caption) pair, or one row per image in a gallery without captions."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.errors import UserError

USUAL_NAMES = {
    "image": ("image", "image_path", "filepath", "file_path", "filename", "file_name", "path", "img", "img_path"),
    "caption": ("caption", "text", "title", "name", "description", "productdisplayname", "product_name"),
    "product": (),
    "id": ("id", "product_id", "sku", "item_id", "article_id"),
    "category": ("category", "class", "label", "type", "product_type", "subcategory"),
}
"""Role -> column names by which it is recognised, the first that exists; case is ignored, and _ matches space and -.

A product column is never recognised by its name, because rows with one id are often different products.
"""
MISSING = {"", "NA", "N/A", "<NA>", "nan", "NaN", "None", "null", "NULL"}
PROBLEMS = {
    "product": "row without a product",
    "caption": "row without a caption",
    "id": "row without an id",
}
"""Role -> the oddity of a row without a value in its column."""


@dataclass(slots=True)
class _Entry:
    id: str
    images: list[str]
    captions: list[str]
    values: dict[str, str]

    def add(self, image: str, caption: str, values: Mapping[str, str]) -> None:
        if image not in self.images:
            self.images.append(image)
        if caption and caption not in self.captions:
            self.captions.append(caption)
        for column, value in values.items():
            self.values.setdefault(column, value)


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the oddities of a table, then its products in the order of their first rows.

    `path` is the table, or a folder that contains `metadata.csv` or exactly one table. Image paths are relative to the
    table's folder. Rows with the same id and image are one product with several captions; rows with the same id and
    other images are other products with that id. Without an id column, the image's path is the id. Columns other than
    id, image and caption become attributes, each with the value of the first row that has it. A table without a caption
    column is a gallery: its products have no captions, and an oddity reports this.

    If `columns` names a `product` column, rows with the same value of it are one product, whose id is that value. It
    has the images and captions of these rows in their order, each once; some of the rows may lack a caption. With
    `unit` = "photo", rows are then products as without this column, and a group if they have the same value.

    An id is the text of the cell, with all its white space. Bytes that are not UTF-8 become surrogates, in texts and in
    image paths (see `catalog.mend`).

    Raises:
      UserError: there is no table, the image column or a configured column is missing, a quotation mark is not closed,
        or no row is usable.
    """
    table = _find_table(path)
    entries: dict[str | tuple[str, str], _Entry] = {}
    roles: dict[str, str] = {}
    merging = bool(columns.get("product")) and unit == "article"
    for location, values in _rows(table):
        if isinstance(values, str):
            yield Oddity(location, values, dropped=True)
            continue
        if not roles:
            roles = _roles(table, list(values), columns)
            if "caption" not in roles:
                yield Oddity(table.name, "no caption column (set it with data.columns.caption)", dropped=False)
            id_column = roles.get("product" if merging else "id", "")
            needed = ("product",) if merging else ("caption", "id")
            required = [(roles[role], PROBLEMS[role]) for role in needed if role in roles]
        row_values = {
            column: " ".join(value.split()) for column, value in values.items() if value.strip() not in MISSING
        }
        image, caption = values[roles["image"]].strip(), row_values.get(roles.get("caption"), "")
        problem = _find_problem(image, row_values, required)
        if problem:
            yield Oddity(location, problem, dropped=True)
            continue
        id_ = values[id_column] if id_column else image
        key = id_ if merging else (id_, image)
        if key in entries:
            entries[key].add(image, caption, row_values)
        else:
            entries[key] = _Entry(id_, [image], [caption] if caption else [], row_values)
    if not entries:
        raise UserError(
            f"no row of {table} has an image (and a caption, if the table has a caption column): name the columns with "
            "--config.data.columns.image and --config.data.columns.caption"
        )
    others = {roles.get(role) for role in ("product", "id", "image", "caption")} | {""}
    category, group = roles.get("category", ""), "" if merging else roles.get("product", "")
    for entry in entries.values():
        if not entry.captions and "caption" in roles:
            yield Oddity(entry.id, "product without a caption", dropped=True)
            continue
        yield Product(
            entry.id,
            tuple([table.parent / image for image in entry.images]),
            tuple(entry.captions),
            entry.values.get(category, ""),
            {column: value for column, value in entry.values.items() if column not in others},
            entry.values.get(group, ""),
        )


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
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
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


def _find_problem(image: str, values: Mapping[str, str], required: Iterable[tuple[str, str]]) -> str:
    """Returns the kind of oddity of a row; `required` has columns that need a value, each with the kind."""
    if image in MISSING:
        return "row without an image"
    if image.startswith(("http://", "https://")):
        return "image is a URL, not a file"
    for column, problem in required:
        if column not in values:
            return problem
    return ""
