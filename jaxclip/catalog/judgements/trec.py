"""The files of trec_eval: qrels, topics and runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxclip.catalog.judgements.files import JSON_LINES, find_roles, json_records, read_text, table_rows
from jaxclip.catalog.judgements.judgements import Judgements
from jaxclip.catalog.judgements.rows import TEXT, Rows
from jaxclip.errors import UserError


@dataclass(frozen=True)
class Run:
    """Rankings of products for queries.

    Attributes:
      query_ids: the Q queries, in the order of the file.
      product_ids: for each query its products, best first.
      scores: for each query the scores of its products, falling.
    """

    query_ids: list[str]
    product_ids: list[list[str]]
    scores: list[list[float]]


def read_qrels(path: Path, texts: dict[str, str]) -> Rows:
    """Returns the rows of a qrels file, lines `QUERY_ID 0 PRODUCT GRADE`.

    Args:
      path: the file. A product id may contain spaces.
      texts: the text of each query id.

    Raises:
      UserError: a line does not have these fields.
    """
    lines, ids, products, grades = [], [], [], []
    for line, id_, rest in _lines(path, "QUERY_ID 0 PRODUCT GRADE"):
        product, grade = _last_field(path, line, rest, "QUERY_ID 0 PRODUCT GRADE")
        lines.append(line), ids.append(id_), products.append(product), grades.append(grade)
    queries = pa.array([texts.get(id_) for id_ in ids], TEXT)
    return Rows(str(path), np.asarray(lines), queries, *(pa.array(x, TEXT) for x in (products, ids, grades)))


def is_qrels(path: Path) -> bool:
    """Returns whether the first line of a file is one of qrels: four fields, the last a whole number."""
    with path.open("rb") as file:
        fields = file.readline().split()
    return len(fields) >= 4 and fields[-1].lstrip(b"-").isdigit()


def read_topics(path: Path) -> dict[str, str]:
    """Returns query id -> text, from JSON lines or from a table, which may have no header if it is `ID<TAB>TEXT`.

    Raises:
      UserError: a row has no id or no text, or an id occurs again with another text.
    """
    texts = {}
    for line, id_, text in _topics(path):
        if not id_ or not text:
            raise UserError(f"{path}:{line}: a query's id and its text expected")
        if texts.setdefault(id_, text) != text:
            raise UserError(f"{path}:{line}: query {id_} occurs again with another text")
    return texts


def _topics(path: Path) -> Iterator[tuple[int, str, str]]:
    if path.suffix.lower() in JSON_LINES:
        for line, record in json_records(path):
            id_ = next((record[name] for name in ("_id", "query_id", "qid", "id") if name in record), "")
            yield line, str(id_), str(record.get("text", record.get("query", "")))
        return
    id_place, text_place = 0, 1
    for number, (line, fields) in enumerate(table_rows(path)):
        if not number:
            roles = find_roles(fields)
            names = (roles.get("query_id", roles.get("product")), roles.get("query"))
            if None not in names:
                id_place, text_place = map(fields.index, names)
                continue
        if len(fields) <= max(id_place, text_place):
            raise UserError(f"{path}:{line}: ID<TAB>TEXT expected, found {len(fields)} field(s)")
        yield line, fields[id_place], fields[text_place]


def write_qrels(path: Path, judgements: Judgements) -> None:
    """Writes judgements as qrels; queries without an id get their number, from 1.

    trec_eval reads whole grades only, so fractional ones (ESCI, WANDS) are for tools that take real numbers.

    Raises:
      UserError: an id contains white space.
    """
    ids = names_of(judgements)
    products = [_without_space(path, "product", id_) for id_ in judgements.product_ids]
    columns = judgements.queries, judgements.products, judgements.grades
    with path.open("w", encoding="utf-8") as file:
        for query, product, grade in zip(*(column.tolist() for column in columns), strict=True):
            file.write(f"{_without_space(path, 'query', ids[query])} 0 {products[product]} {grade:.9g}\n")


def names_of(judgements: Judgements) -> list[str]:
    """Returns the queries' ids for qrels and runs: the file's, or else their numbers, from 1."""
    return [id_ or str(number) for number, id_ in enumerate(judgements.query_ids, 1)]


def write_run(
    path: Path,
    query_ids: Sequence[str],
    product_ids: Sequence[str],
    items: np.ndarray,
    scores: np.ndarray,
    tag: str = "jaxclip",
) -> None:
    """Writes rankings as lines `QUERY_ID Q0 PRODUCT RANK SCORE TAG`.

    trec_eval orders by score and ignores ranks; equal scores it orders by product id.

    Args:
      query_ids: the Q queries (see `names_of`).
      product_ids: the gallery's products.
      items: (Q, K) int, indices in the gallery, best first; negative = no further product.
      scores: (Q, K) float, falling in each row.
      tag: name of the run.

    Raises:
      UserError: an id contains white space, which trec_eval takes for the end of a field.
      ValueError: shapes do not fit.
    """
    if items.shape != scores.shape or len(items) != len(query_ids):
        raise ValueError(f"items and scores of {len(query_ids)} queries expected, got {items.shape}, {scores.shape}")
    with path.open("w", encoding="utf-8") as file:
        for id_, row, row_scores in zip(query_ids, items.tolist(), scores.tolist(), strict=True):
            query = _without_space(path, "query", id_)
            found = [(item, score) for item, score in zip(row, row_scores, strict=True) if item >= 0]
            for rank, (item, score) in enumerate(found, 1):
                product = _without_space(path, "product", product_ids[item])
                file.write(f"{query} Q0 {product} {rank} {score:.9g} {tag}\n")


def read_run(path: Path) -> Run:
    """Returns the rankings of a file of lines `QUERY_ID Q0 PRODUCT RANK SCORE TAG`, ordered by score, then by rank.

    Raises:
      UserError: a line does not have these fields, or rank or score is not a number.
    """
    form, found = "QUERY_ID Q0 PRODUCT RANK SCORE TAG", {}
    for line, id_, rest in _lines(path, form):
        try:
            product, rank, score, _ = rest.rsplit(None, 3)
            entry = (-float(score), int(rank), product)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {form} expected, found {rest!r}") from error
        found.setdefault(id_, []).append(entry)
    ranked = {id_: sorted(entries, key=lambda entry: entry[:2]) for id_, entries in found.items()}
    products = [[product for _, _, product in entries] for entries in ranked.values()]
    return Run(list(ranked), products, [[-score for score, _, _ in entries] for entries in ranked.values()])


def _lines(path: Path, form: str) -> Iterator[tuple[int, str, str]]:
    """Yields (line, first field, what follows the second field)."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        fields = text.split(None, 2)
        if not fields:
            continue
        if len(fields) < 3:
            raise UserError(f"{path}:{line}: {form} expected, found {len(fields)} field(s)")
        yield line, fields[0], fields[2].strip()


def _last_field(path: Path, line: int, rest: str, form: str) -> tuple[str, str]:
    fields = rest.rsplit(None, 1)
    if len(fields) < 2:
        raise UserError(f"{path}:{line}: {form} expected, found {2 + len(fields)} fields")
    return fields[0], fields[1]


def _without_space(path: Path, role: str, id_: str) -> str:
    if len(id_.split()) != 1 or id_ != id_.strip():
        raise UserError(f"{path}: the {role} id {id_!r} has white space or is empty, which trec_eval cannot read")
    return id_
