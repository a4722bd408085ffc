"""Rows of CSV, TSV, JSON lines and Parquet files, whose columns are recognised by their usual names."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from jaxclip.catalog.judgements.rows import TEXT, Rows, is_number, text_column
from jaxclip.errors import UserError

USUAL_NAMES = {
    "query": ("query", "query_text", "search_query", "search_term", "keywords", "text"),
    "query_id": ("query_id", "qid", "topic"),
    "product": ("product", "product_id", "corpus_id", "doc_id", "docid", "sku", "item_id", "item", "asin", "id"),
    "grade": ("grade", "relevance", "label", "esci_label", "score", "rating", "judgement", "judgment", "gain"),
    "weight": ("weight", "clicks", "count"),
    "split": ("split",),
}
"""Role -> column names by which it is recognised, the first that exists; case is ignored, and _ matches space and -."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".csv", ".tsv", *JSON_LINES, ".parquet")


Texts = Callable[[], Mapping[str, str]]
"""Returns query id -> text; called only for a file that has no column of queries."""


def read_rows(path: Path, texts: Texts) -> Rows:
    """Returns the rows of a file of one of SUFFIXES.

    Args:
      path: the file.
      texts: finds the texts of queries of which the file has the ids alone.

    Raises:
      UserError: the file is malformed, or has no column of queries or of products.
    """
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, texts)
    if path.suffix.lower() in JSON_LINES:
        columns, lines = _json_columns(path)
        return make_rows(path, columns, lines, texts)
    rows = table_rows(path)
    header_line, header = next(rows, (1, []))
    values, lines, longer = [], [], []
    width = len(header)
    for line, row in rows:
        if len(row) > width:
            longer.append(line)
        elif row:
            values.append(row if len(row) == width else row + [""] * (width - len(row)))
            lines.append(line)
    columns = dict(zip(header, zip(*values, strict=True) if values else [()] * width, strict=True))
    found = make_rows(path, columns, lines, texts, header_line)
    kind = "row with too many fields: quote fields that contain the delimiter"
    if longer:
        return Rows(**{**vars(found), "oddities": {kind: len(longer)}, "examples": {kind: f"{path}:{longer[0]}"}})
    return found


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file; UserError names the first line that is no UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8: save the file in UTF-8") from error


def table_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, fields) of a file of columns, its header included and stripped of white space.

    The delimiter is a tab in .tsv files; in others it is the comma, semicolon or tab that is most frequent in the first
    line. In tab-separated files a field is quoted only if it begins and ends with a quotation mark.

    Raises:
      UserError: the file is not UTF-8, or a quotation mark is not closed.
    """
    text = read_text(path)
    first = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    if delimiter == "\t":
        for line, row in enumerate(text.split("\n"), 1):
            if row := row.removesuffix("\r"):
                fields = [_unquoted(field) if field[:1] == '"' else field for field in row.split("\t")]
                yield line, fields
        return
    rows, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for row in rows:
            yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: {error}; put fields that contain commas, quotes or line breaks in quotes, and double the "
            "quotes inside them"
        ) from error


def _unquoted(field: str) -> str:
    return field[1:-1].replace('""', '"') if len(field) > 1 and field[-1] == '"' else field


def find_roles(names: Sequence[str]) -> dict[str, str]:
    """Returns role -> name, for the roles of USUAL_NAMES that some of these names of columns have."""
    by_name = {name.strip().casefold().replace(" ", "_").replace("-", "_"): name for name in reversed(names)}
    found = {}
    for role, usual in USUAL_NAMES.items():
        name = next((by_name[name] for name in usual if name in by_name), None)
        if name is not None:
            found[role] = name
    return found


def make_rows(path: Path, columns: Mapping[str, Sequence], lines: Sequence[int], texts: Texts, header: int = 0) -> Rows:
    """Returns the rows of columns by name, lists of text or pyarrow arrays; `header` is the header's line, for errors.

    Raises:
      UserError: there is no column of queries or of query ids, or none of products.
    """
    roles = find_roles(list(columns))
    place, listed = f"{path}:{header}" if header else str(path), ", ".join(columns)
    if "product" not in roles:
        raise UserError(f"{place} has no column of products (its columns are {listed}): name one product")
    if "query" not in roles and "query_id" not in roles:
        raise UserError(f"{place} has no column of queries (its columns are {listed}): name one query")

    def text(role: str) -> pa.Array | None:
        if role not in roles:
            return None
        column = columns[roles[role]]
        if isinstance(column, pa.Array | pa.ChunkedArray):
            return text_column(column, f"{path}, column {roles[role]},")
        try:
            return pa.array(column, TEXT)
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, column {roles[role]}, is not Unicode text: {error}") from error

    def number(role: str) -> pa.Array | None:
        column = columns.get(roles.get(role))
        is_arrow = isinstance(column, pa.ChunkedArray)
        return column.combine_chunks() if is_arrow and is_number(column.type) else text(role)

    queries, ids = text("query"), text("query_id")
    if queries is None:
        text_of = texts()
        queries = pa.array([text_of.get(id_) for id_ in ids.to_pylist()], TEXT)
    rest = {"grade": number("grade"), "weight": number("weight"), "split": text("split")}
    return Rows(str(path), np.asarray(lines), queries, text("product"), ids, **rest)


def _json_columns(path: Path) -> tuple[dict[str, list], list[int]]:
    columns, lines = {}, []
    for line, record in json_records(path):
        for name in record.keys() - columns.keys():
            columns[name] = [None] * len(lines)
        for name, column in columns.items():
            column.append(record.get(name))
        lines.append(line)
    roles = find_roles(list(columns))

    def plain(line: int, name: str, value: object) -> str | None:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list | dict):
            raise UserError(f"{path}:{line}: {name} is {json.dumps(value)}, not a text or a number")
        return str(int(value) if isinstance(value, float) and value.is_integer() else value)

    return {
        name: [plain(line, name, value) for line, value in zip(lines, column, strict=True)]
        for name, column in columns.items()
        if name in roles.values()
    }, lines


def json_records(path: Path) -> Iterator[tuple[int, dict]]:
    """Yields (line, object) of a file of JSON lines; UserError names a line that is no JSON object."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {error}; write one JSON object per line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{line}: one JSON object per line expected, found a {type(record).__name__}")
        yield line, record


def open_parquet(path: Path) -> parquet.ParquetFile:
    """Returns the opened file; UserError if it is no Parquet file."""
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error


def _read_parquet(path: Path, texts: Texts) -> Rows:
    file = open_parquet(path)
    names = file.schema_arrow.names
    roles = find_roles(names)
    table = file.read(columns=[name for name in names if name in roles.values()])
    columns = {name: table[name] if name in table.column_names else [] for name in names}
    return make_rows(path, columns, range(1, table.num_rows + 1), texts)
