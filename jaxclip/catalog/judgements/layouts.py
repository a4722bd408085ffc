"""Finds out which layout of judgements a file or folder has, and reads it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxclip.catalog.judgements.files import SUFFIXES, open_parquet, read_rows, text_column
from jaxclip.catalog.judgements.judgements import Judgements
from jaxclip.catalog.judgements.rows import TEXT, Rows, gather
from jaxclip.catalog.judgements.trec import is_qrels, read_qrels, read_topics
from jaxclip.errors import UserError

ESCI = "shopping_queries_dataset_examples.parquet"
_TOPICS = tuple(f"{name}{suffix}" for name in ("queries", "topics", "query") for suffix in (".tsv", ".jsonl", ".csv"))
_KNOWN = (
    "a .csv, .tsv, .jsonl or .parquet file with columns query, product and grade; a TREC qrels file and queries.tsv in "
    "the same folder; or a folder of BEIR (queries.jsonl, qrels/), WANDS (query.csv, label.csv) or Amazon's shopping "
    f"queries ({ESCI})"
)


def read(path: Path, split: str = "", *, locale: str = "us") -> Judgements:
    """Returns the queries and judgements of a file or folder, or those of one split (see `Judgements.of_split`).

    Layouts:
      * CSV, TSV, JSON lines and Parquet files with a query and a product, and optionally the query's id, a grade, a
        weight (or clicks) and a split. Columns are recognised by their usual names (`files.USUAL_NAMES`). Without a
        grade every row is a right answer of grade 1, except rows of weight 0.
      * TREC: a qrels file, or a folder with one (its name contains "qrels"), and the queries in queries.tsv,
        topics.tsv, queries.jsonl or the like in the same folder.
      * BEIR: a folder with queries.jsonl and qrels/train.tsv, dev.tsv and test.tsv; dev is validation. Or one of the
        files in qrels/.
      * ESCI, Amazon's shopping queries: the file of examples or its folder. Gains are those of its paper: exact 1,
        substitute 0.1, complement 0.01, irrelevant 0. Only queries of `locale` are read.
      * WANDS: a folder with query.csv and label.csv, with the usual gains: exact 1, partial 0.5, irrelevant 0.

    Args:
      path: the file or folder.
      split: "train", "validation" or "test"; "" or "all" for all queries.
      locale: the locale of ESCI's queries: "us", "es" or "jp"; "" for all.

    Raises:
      UserError: the path does not exist or has no known layout, a file is malformed, or no judgement is usable. The
        message names the file and, where there is one, the line and the column.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"data.queries: {path} does not exist; give {_KNOWN}")
    parts = _read_folder(path, locale) if path.is_dir() else [_read_file(path, locale)]
    return gather(str(path), parts).of_split(split)


def _read_folder(folder: Path, locale: str) -> list[Rows]:
    for inner in (folder, folder / "dataset", folder / "shopping_queries_dataset"):
        if (inner / ESCI).is_file():
            return [_read_esci(inner / ESCI, locale)]
        if (inner / "query.csv").is_file() and (inner / "label.csv").is_file():
            return [_read_file(inner / "label.csv", locale)]
    if (folder / "qrels").is_dir():
        files = sorted((folder / "qrels").glob("*.tsv"))
        if not files:
            raise UserError(f"{folder / 'qrels'} has no .tsv files: BEIR's are train.tsv, dev.tsv and test.tsv")
        return [_read_file(file, locale) for file in files]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    qrels = [file for file in files if "qrels" in file.name.lower()]
    tables = [file for file in files if file.suffix.lower() in SUFFIXES]
    tables = qrels or [file for file in tables if file.name not in _TOPICS] or tables
    if len(tables) != 1:
        found = ", ".join(file.name for file in tables or files) or "nothing"
        raise UserError(f"data.queries: {folder} holds no single file of judgements (found: {found}); give {_KNOWN}")
    return [_read_file(tables[0], locale)]


def _read_file(path: Path, locale: str) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".parquet" and "esci_label" in open_parquet(path).schema_arrow.names:
        return _read_esci(path, locale)
    if suffix not in (".csv", ".parquet") and is_qrels(path):
        rows = read_qrels(path, read_topics(_find_topics(path)))
    elif suffix in SUFFIXES:
        rows = read_rows(path, lambda: read_topics(_find_topics(path)))
    else:
        raise UserError(f"data.queries: {path} has no known layout; give {_KNOWN}")
    return _of_split(rows, path.stem) if path.parent.name == "qrels" else rows


def _find_topics(path: Path) -> Path:
    """Returns the file with the texts of the queries, in the folder of `path` or the one above a folder qrels."""
    folders = [path.parent, path.parent.parent] if path.parent.name == "qrels" else [path.parent]
    for folder in folders:
        for name in _TOPICS:
            if (folder / name).is_file() and folder / name != path:
                return folder / name
    raise UserError(
        f"{path} has the ids of queries but not their texts: put queries.tsv with lines ID<TAB>TEXT, or queries.jsonl "
        f'with {{"_id": ID, "text": TEXT}}, into {folders[-1]}'
    )


def _of_split(rows: Rows, split: str) -> Rows:
    """Returns the rows with a split named after their file, if it names one."""
    known = {"train": "train", "dev": "validation", "validation": "validation", "test": "test"}.get(split, "")
    return Rows(**{**vars(rows), "split": pa.array(np.full(len(rows.lines), known, object), TEXT)})


def _read_esci(path: Path, locale: str) -> Rows:
    """Returns the rows of a file of ESCI's examples."""
    columns = ("query", "query_id", "product_id", "product_locale", "esci_label", "split")
    file = open_parquet(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)} of {ESCI}")
    table = file.read(columns=list(columns))
    lines = np.arange(1, table.num_rows + 1)
    if locale:
        chosen = pc.fill_null(pc.equal(table["product_locale"], locale), False)
        table, lines = table.filter(chosen), lines[chosen.to_numpy()]
        if not table.num_rows:
            raise UserError(f"{path} has no queries of the locale {locale!r}")
    query, id_, product, _, label, split = (text_column(table[name], f"{path}, column {name},") for name in columns)
    return Rows(str(path), lines, query, product, id_, label, split=split)
