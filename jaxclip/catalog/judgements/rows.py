"""Rows of judgement files: what a row must have, and how rows of several files become judgements."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jaxclip.catalog.captions import normalise
from jaxclip.catalog.judgements.judgements import SPLITS, Judgements
from jaxclip.errors import UserError

TEXT = pa.large_string()
ESCI_GAINS = {"exact": 1.0, "substitute": 0.1, "complement": 0.01, "irrelevant": 0.0}
"""Gains of the labels of Amazon's shopping queries (Reddy et al. 2022, arXiv:2206.06588)."""
GAINS = ESCI_GAINS | {label[0]: gain for label, gain in ESCI_GAINS.items()} | {"partial": 0.5}
"""Label in lower case -> gain. WANDS states no gains for its exact, partial and irrelevant; these are usual."""
_SPLIT_NAMES = {"": 0, "train": 1, "training": 1, "dev": 2, "val": 2, "valid": 2, "validation": 2, "test": 3}


@dataclass(frozen=True)
class Rows:
    """N rows of one file.

    Attributes:
      source: the file, for messages.
      lines: (N,) line (or row, from 1) of each.
      query: the N texts; null or blank if missing.
      product: the N product ids, likewise.
      query_id: the N ids of the queries; None if the file has none.
      grade: the N grades, numbers or words; None if every row is a right answer, such as a click.
      weight: the N weights, such as numbers of clicks; None = 1.
      split: the N splits; None if the file does not say.
      oddities: oddities found while reading -> how many.
      examples: oddity -> its first place.
    """

    source: str
    lines: np.ndarray
    query: pa.Array
    product: pa.Array
    query_id: pa.Array | None = None
    grade: pa.Array | None = None
    weight: pa.Array | None = None
    split: pa.Array | None = None
    oddities: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Checked:
    """The usable rows of a file: each field has an entry per row."""

    query: pa.Array
    query_id: pa.Array
    product: pa.Array
    grade: np.ndarray
    weight: np.ndarray
    split: np.ndarray


def text_column(values: pa.Array | pa.ChunkedArray, name: str = "") -> pa.Array:
    """Returns a column as text; whole numbers that a file stores as floating point have no decimals.

    Raises:
      UserError: the column holds lists or objects, or numbers that are not whole. `name` is the file and the column.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # no chunk at all in some versions of pyarrow
        values = pa.array([], TEXT)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    try:
        if pa.types.is_floating(values.type):
            values = values.cast(pa.int64())
        return values.cast(TEXT)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{name} is no column of text or whole numbers: {error}") from error


def is_number(kind: pa.DataType) -> bool:
    """Returns whether a column of this type holds numbers; True and False count as 1 and 0."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def gather(source: str, parts: list[Rows]) -> Judgements:
    """Returns the judgements of the rows of one or more files.

    Rows without a query, a product, or a grade or weight that is a number are left out and counted. Negative grades
    count as 0. Of several rows of one query and product the highest grade is kept. The weights of such rows add up if
    their file has weights or no grades, as in click logs. A query's split is the most strictly held back one that
    occurs with its text.

    Raises:
      UserError: no row is usable, or a split has an unknown name.
    """
    oddities, examples = Counter(), {}
    usable = [_check(rows, oddities, examples) for rows in parts]
    columns = {name: _joined([getattr(rows, name) for rows in usable]) for name in _Checked.__dataclass_fields__}
    if not len(columns["grade"]):
        kinds = "; ".join(f"{count} x {kind}" for kind, count in oddities.items()) or "it is empty"
        raise UserError(f"{source} has no usable judgement ({kinds}): each row needs a query and a product")
    texts, text_of = _distinct(columns["query"])
    ids, id_of = _distinct(columns["query_id"])
    product_ids, products = _distinct(columns["product"])
    splits = _split_of_texts(texts, text_of, columns["split"], oddities)
    pairs, queries = _numbered(id_of.astype(np.int64) * len(texts) + text_of)
    adds_up = any(rows.weight is not None or rows.grade is None for rows in parts)
    found = _merged(queries, products, columns["grade"], columns["weight"], adds_up)
    repeated = len(queries) - len(found[0])
    if repeated and not all(rows.grade is None for rows in parts):
        oddities["several rows of one query and product"] += repeated
    return Judgements(
        source,
        [texts[pair] for pair in pairs % len(texts)],
        [ids[pair] for pair in pairs // len(texts)],
        [SPLITS[splits[pair]] for pair in pairs % len(texts)],
        product_ids,
        *(x.astype(kind) for x, kind in zip(found, (np.int32, np.int32, np.float32, np.float32), strict=True)),
        dict(oddities),
        examples,
    )


def _check(rows: Rows, oddities: Counter, examples: dict[str, str]) -> _Checked:
    """Returns the usable rows, and adds what is odd to `oddities` and `examples`."""
    size = len(rows.lines)
    no_numbers = np.ones(size)
    weight = no_numbers if rows.weight is None else _numbers(rows.weight, {})
    grade = np.where(weight > 0, 1.0, 0.0) if rows.grade is None else _numbers(rows.grade, GAINS)
    problems = {
        "row without a query": _blank(rows.query),
        "row without a product": _blank(rows.product),
        "grade that is not a number": np.isnan(grade) if rows.grade is not None else np.zeros(size, bool),
        "weight that is not a number >= 0": ~(weight >= 0),
    }
    for kind, count in rows.oddities.items():
        oddities[kind] += count
        examples.setdefault(kind, rows.examples[kind])
    kept = np.ones(size, bool)

    def note(kind: str, found: np.ndarray) -> None:
        if found.any():
            oddities[kind] += int(found.sum())
            examples.setdefault(kind, f"{rows.source}:{rows.lines[np.argmax(found)]}")

    for kind, found in problems.items():
        note(kind, found & kept)
        kept &= ~found
    note("negative grade, taken as 0", kept & (grade < 0))
    selected = pa.array(kept)
    blank = pa.array(np.full(size, "", object), TEXT)
    return _Checked(
        rows.query.filter(selected),
        (blank if rows.query_id is None else pc.fill_null(rows.query_id, "")).filter(selected),
        rows.product.filter(selected),
        np.maximum(grade[kept], 0.0),
        weight[kept],
        np.zeros(kept.sum(), np.int64) if rows.split is None else _split_numbers(rows)[kept],
    )


def _blank(column: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), True).to_numpy(zero_copy_only=False)


def _numbers(column: pa.Array, words: Mapping[str, float]) -> np.ndarray:
    """Returns the column's numbers (N,) float64; NaN where there is no finite number."""
    if is_number(column.type):
        numbers = pc.fill_null(column.cast(pa.float64()), math.nan).to_numpy(zero_copy_only=False)
        return np.where(np.isfinite(numbers), numbers, np.nan)

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            return words.get(text.strip().casefold(), math.nan)
        return value if math.isfinite(value) else math.nan

    return _mapped(column, number)


def _mapped(column: pa.Array, function: Callable[[str], float]) -> np.ndarray:
    """Returns function(text) of each entry of a column, called once for each distinct one; missing entries are ""."""
    distinct, codes = _distinct(pc.fill_null(column.cast(TEXT), ""))
    return np.asarray([function(text) for text in distinct])[codes] if len(codes) else np.zeros(0)


def _split_numbers(rows: Rows) -> np.ndarray:
    numbers = _mapped(rows.split, lambda text: _SPLIT_NAMES.get(text.strip().casefold(), -1)).astype(np.int64)
    if (numbers < 0).any():
        first = int(np.argmax(numbers < 0))
        raise UserError(
            f"{rows.source}:{rows.lines[first]}: the split {rows.split[first].as_py()!r} is not one of train, "
            "validation (or dev) and test"
        )
    return numbers


def _split_of_texts(texts: list[str], text_of: np.ndarray, split: np.ndarray, oddities: Counter) -> np.ndarray:
    """Returns the split of each text; texts that differ in case or spaces only are in one split, the strictest."""
    numbers: dict[str, int] = {}
    number_of = np.fromiter((numbers.setdefault(normalise(text), len(numbers)) for text in texts), np.int64, len(texts))
    strictest, loosest = np.zeros(len(numbers), np.int64), np.full(len(numbers), len(SPLITS))
    np.maximum.at(strictest, number_of[text_of], split)
    np.minimum.at(loosest, number_of[text_of], split)
    mixed = int(np.sum(strictest != loosest))
    if mixed:
        oddities["query in several splits, taken as held back"] += mixed
    return strictest[number_of]


def _merged(queries, products, grades, weights, adds_up: bool) -> tuple[np.ndarray, ...]:
    """Returns (queries, products, grades, weights) with each query and product once, sorted by query."""
    key = queries.astype(np.int64) * (int(products.max()) + 1) + products
    order = np.argsort(key, kind="stable")
    is_first = np.diff(key[order], prepend=-1) != 0
    starts = np.flatnonzero(is_first)
    first = order[starts]  # a stable sort: the first row of each pair
    if len(starts) < len(key):
        grades = np.maximum.reduceat(grades[order], starts)
        weights = np.add.reduceat(weights[order], starts) if adds_up else weights[first]
    else:
        grades, weights = grades[order], weights[order]
    again = np.lexsort((first, queries[first]))
    return queries[first][again], products[first][again], grades[again], weights[again]


def _distinct(column: pa.Array) -> tuple[list[str], np.ndarray]:
    """Returns the distinct texts in the order of their first occurrence, and the number of each row's (N,)."""
    encoded = column.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct keys in the order of their first occurrence, and the number of each row's (N,)."""
    encoded = pa.array(keys).dictionary_encode()
    return encoded.dictionary.to_numpy(), encoded.indices.to_numpy(zero_copy_only=False)


def _joined(columns: list) -> pa.Array | np.ndarray:
    return np.concatenate(columns) if isinstance(columns[0], np.ndarray) else pa.concat_arrays(columns)
