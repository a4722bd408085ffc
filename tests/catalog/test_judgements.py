"""Judgement files of every layout give the same arrays, and what is odd in them is counted or refused."""

import json
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.catalog.captions import normalise
from jaxclip.catalog.judgements import read
from jaxclip.catalog.judgements.trec import names_of, read_run, write_qrels, write_run
from jaxclip.errors import UserError

ROWS = [  # query, product, grade, split, weight
    ("red  shirt", "007", 2, "train", 3),
    ("red  shirt", "A b", 1, "train", 1),
    ('15" clock, round', "007", 0, "test", 2),
    ('15" clock, round', "x-9", 1, "test", 5),
]


def as_rows(judgements):
    """Returns {(query, product): (grade, split, weight)}."""
    j = judgements
    arrays = zip(j.queries, j.products, j.grades.tolist(), j.weights.tolist(), strict=True)
    return {(j.texts[q], j.product_ids[p]): (grade, j.splits[q], weight) for q, p, grade, weight in arrays}


EXPECTED = {(query, product): (grade, split, weight) for query, product, grade, split, weight in ROWS}
WITHOUT_WEIGHTS = {key: (grade, split, 1.0) for key, (grade, split, _) in EXPECTED.items()}
WITHOUT_SPLITS = {key: (grade, "", 1.0) for key, (grade, _, _) in EXPECTED.items()}


def quoted(value):
    return '"' + str(value).replace('"', '""') + '"'


def write_csv(folder, delimiter=",", name="j.csv", end="\n"):
    header = ["Search Term", "SKU", "Relevance", "split", "Clicks"]
    lines = [delimiter.join(map(quoted, row)) for row in [header, *ROWS]]
    (folder / name).write_text("\ufeff" + end.join(lines) + end, encoding="utf-8")
    return folder / name


def write_tsv(folder):
    lines = ["\t".join(map(str, row)) for row in [("query", "product_id", "score", "split", "count"), *ROWS]]
    (folder / "j.tsv").write_text("\r\n".join(lines))
    return folder / "j.tsv"


def write_jsonl(folder):
    names = ("query", "item_id", "rating", "split", "weight")
    (folder / "j.jsonl").write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in ROWS))
    return folder / "j.jsonl"


def write_parquet(folder):
    names = ("query", "product", "label", "split", "clicks")
    table = pa.table(dict(zip(names, map(list, zip(*ROWS, strict=True)), strict=True)))
    parquet.write_table(table, folder / "j.parquet", use_dictionary=["query"])
    return folder / "j.parquet"


@pytest.mark.parametrize(
    "write",
    [write_csv, lambda folder: write_csv(folder, ";", end="\r\n"), write_tsv, write_jsonl, write_parquet],
    ids=["csv", "semicolons", "tsv", "jsonl", "parquet"],
)
def test_every_kind_of_table_gives_the_same_judgements(tmp_path, write):
    path = write(tmp_path)
    for place in (path, tmp_path):
        found = read(place)
        assert as_rows(found) == EXPECTED and not found.oddities
        assert found.texts == ["red  shirt", '15" clock, round'] and found.query_ids == ["", ""]
        assert found.queries.dtype == found.products.dtype == np.int32 and found.grades.dtype == np.float32
    assert as_rows(read(path, "train")) == {key: row for key, row in EXPECTED.items() if row[1] == "train"}
    assert read(path, "test").product_ids == ["007", "x-9"]
    with pytest.raises(UserError, match="has no queries of the split 'validation' .it has test, train.: add a column"):
        read(path, "validation")
    assert [found.has_split(split) for split in ("", "all", "train", "validation", "test")] == [
        True,
        True,
        True,
        False,
        True,
    ]


def trec_folder(folder, topics="queries.tsv", header=""):
    numbers = {'15" clock, round': "7", "red  shirt": "q2"}
    rows = [f"{numbers[query]} 0 {product} {grade}" for query, product, grade, *_ in ROWS]
    (folder / "qrels.txt").write_text("\n".join(rows) + "\n")
    if topics.endswith("jsonl"):
        lines = [json.dumps({"_id": id_, "text": text}) for text, id_ in numbers.items()]
    else:
        lines = ([header] if header else []) + [f"{id_}\t{text}" for text, id_ in numbers.items()]
    (folder / topics).write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("topics", "header"), [("queries.tsv", ""), ("topics.tsv", "query_id\ttext"), ("queries.jsonl", "")]
)
def test_trec_qrels_take_their_texts_from_the_topics_beside_them(tmp_path, topics, header):
    folder = trec_folder(tmp_path, topics, header)
    for place in (folder, folder / "qrels.txt"):
        found = read(place)
        assert as_rows(found) == WITHOUT_SPLITS and found.query_ids == ["q2", "7"]


def test_qrels_without_texts_are_refused(tmp_path):
    (trec_folder(tmp_path) / "queries.tsv").unlink()
    with pytest.raises(UserError, match="qrels.txt has the ids of queries but not their texts: put queries.tsv"):
        read(tmp_path)


def test_a_query_without_a_text_is_counted(tmp_path):
    folder = trec_folder(tmp_path)
    (folder / "queries.tsv").write_text("q2\tred  shirt\n")
    found = read(folder)
    assert found.texts == ["red  shirt"] and found.oddities == {"row without a query": 2}
    assert found.examples["row without a query"] == f"{folder / 'qrels.txt'}:3"


def test_a_beir_folder_has_a_split_in_each_file(tmp_path):
    numbers = {query: str(i) for i, query in enumerate(dict.fromkeys(row[0] for row in ROWS))}
    lines = [json.dumps({"_id": id_, "text": text, "metadata": {}}) for text, id_ in numbers.items()]
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    (tmp_path / "corpus.jsonl").write_text('{"_id": "007", "text": "a shirt"}')
    (tmp_path / "qrels").mkdir()
    for name, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
        rows = [f"{numbers[row[0]]}\t{row[1]}\t{row[2]}" for row in ROWS if row[3] == split]
        rows = rows or ["1\tx-9\t1"]  # the query is also one of the test split
        (tmp_path / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    found = read(tmp_path)
    assert as_rows(found) == WITHOUT_WEIGHTS
    assert found.oddities == {
        "query in several splits, taken as held back": 1,
        "several rows of one query and product": 1,
    }
    assert as_rows(read(tmp_path / "qrels" / "test.tsv")) == {
        k: v for k, v in WITHOUT_WEIGHTS.items() if v[1] == "test"
    }
    assert set(read(tmp_path / "qrels" / "dev.tsv").splits) == {"validation"}


def test_amazons_shopping_queries_have_the_gains_of_their_paper(tmp_path):
    columns = {
        "example_id": range(5),
        "query": ["a lamp"] * 4 + ["una lámpara"],
        "query_id": [3] * 4 + [4],
        "product_id": ["B1", "B2", "B3", "B4", "B1"],
        "product_locale": ["us"] * 4 + ["es"],
        "esci_label": ["E", "S", "C", "I", "E"],
        "small_version": [1] * 5,
        "large_version": [1] * 5,
        "split": ["train"] * 4 + ["test"],
    }
    path = tmp_path / "shopping_queries_dataset_examples.parquet"
    parquet.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    found = read(tmp_path)
    np.testing.assert_allclose(found.grades, [1, 0.1, 0.01, 0], rtol=1e-6)
    assert found.query_ids == ["3"] and found.splits == ["train"] and found.product_ids == ["B1", "B2", "B3", "B4"]
    assert read(path, locale="es").texts == ["una lámpara"] and len(read(path, locale="")) == 5
    with pytest.raises(UserError, match="has no queries of the locale 'jp'"):
        read(path, locale="jp")
    parquet.write_table(parquet.read_table(path).drop_columns(["product_locale"]), path)
    with pytest.raises(UserError, match="lacks the columns product_locale"):
        read(path)


def test_wands_has_its_usual_gains(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "query.csv").write_text("query_id\tquery\tquery_class\n0\tsalon chair\tChairs\n1\ttv 54 in\tTVs\n")
    labels = ["id\tquery_id\tproduct_id\tlabel", "0\t0\t25\tExact", "1\t0\t12\tPartial", "2\t1\t25\tIrrelevant"]
    (folder / "label.csv").write_text("\n".join(labels))
    (folder / "product.csv").write_text("product_id\tproduct_name\n25\ta chair\n")
    for place in (tmp_path, folder, folder / "label.csv"):
        expected = {("salon chair", "25"): 1.0, ("salon chair", "12"): 0.5, ("tv 54 in", "25"): 0.0}
        assert {key: row[0] for key, row in as_rows(read(place)).items()} == expected


def read_lines(folder, *lines, name="j.csv"):
    (folder / name).write_text("\n".join(lines))
    return read(folder / name)


def test_rows_that_are_no_judgement_are_counted_with_their_first_place(tmp_path):
    rows = ["a,p,1", ",p,1", "b, ,1", "c,p,good", "d,p,-2", "e,p,nan", "a,p,3", "f,p", "g,p,1,4", "", "h,r,1"]
    found = read_lines(tmp_path, "query,product,grade", *rows)
    assert as_rows(found) == {("a", "p"): (3, "", 1), ("d", "p"): (0, "", 1), ("h", "r"): (1, "", 1)}
    assert found.oddities == {
        "row with too many fields: quote fields that contain the delimiter": 1,
        "row without a query": 1,
        "row without a product": 1,
        "grade that is not a number": 3,
        "negative grade, taken as 0": 1,
        "several rows of one query and product": 1,
    }
    assert found.examples["grade that is not a number"] == f"{tmp_path / 'j.csv'}:5"


def test_clicks_add_up_and_rows_without_clicks_are_no_answers(tmp_path):
    found = read_lines(tmp_path, "query,product", "a,p", "a,p", "b,p", "a,p")
    assert as_rows(found) == {("a", "p"): (1, "", 3), ("b", "p"): (1, "", 1)} and not found.oddities
    found = read_lines(tmp_path, "query,product,clicks", "a,p,2", "a,p,5", "b,p,0")
    assert as_rows(found) == {("a", "p"): (1, "", 7), ("b", "p"): (0, "", 0)}
    found = read_lines(tmp_path, "query,product,grade,clicks", "a,p,1,2", "a,p,3,5", "b,p,1,-1", "b,p,1,")
    assert as_rows(found) == {("a", "p"): (3, "", 7)}
    assert found.oddities["weight that is not a number >= 0"] == 2


def test_ids_stored_as_floating_point_are_whole_numbers(tmp_path):
    table = pa.table({"query": ["a", "b"], "id": [1e15, 12345678901.0]})
    parquet.write_table(table, tmp_path / "j.parquet")
    assert read(tmp_path / "j.parquet").product_ids == ["1000000000000000", "12345678901"]
    parquet.write_table(pa.table({"query": ["a"], "id": [1.5]}), tmp_path / "j.parquet")
    with pytest.raises(UserError, match="j.parquet, column id, is no column of text or whole numbers"):
        read(tmp_path / "j.parquet")


def test_numbers_of_json_and_parquet_are_ids_without_decimals(tmp_path):
    found = read_lines(tmp_path, '{"query": "a", "id": 12}', '{"query": "b", "id": 12.0, "score": 2}', name="j.jsonl")
    assert found.product_ids == ["12"] and found.oddities == {"grade that is not a number": 1}
    parquet.write_table(
        pa.table({"query": ["a", "b"], "id": [12.0, None], "grade": [True, False]}), tmp_path / "j.parquet"
    )
    assert as_rows(read(tmp_path / "j.parquet")) == {("a", "12"): (1, "", 1)}


PROBLEMS = {
    "no query": (
        "j.csv",
        b"text_of_query,sku\na,b",
        "j.csv:1 has no column of queries .its columns are",
    ),
    "no product": ("j.csv", b"query,grade\na,1", "j.csv:1 has no column of products"),
    "ids alone": ("j.csv", b"qid,sku\n1,2", "j.csv has the ids of queries but not their texts: put queries.tsv"),
    "open quote": ("j.csv", b'query,sku\n"a,b\nc,d', "j.csv:2: unexpected end of data"),
    "bytes": ("j.csv", b"query,sku\na,b\n\xff,c", "j.csv:3 is not UTF-8"),
    "split": (
        "j.csv",
        b"query,sku,split\na,b,test\nc,d,hidden",
        "j.csv:3: the split 'hidden' is not one of",
    ),
    "empty": ("j.csv", b"query,sku\n", "has no usable judgement .it is empty."),
    "nothing usable": ("j.csv", b"query,sku\n,b\n", "has no usable judgement .1 x row without a query."),
    "no JSON": ("j.jsonl", b'{"query": "a", "sku": "b"}\n{"query": ', "j.jsonl:2: .*write one JSON object per line"),
    "JSON list": (
        "j.json",
        b'[{"query": "a", "sku": "b"}]',
        "j.json:1: one JSON object per line expected",
    ),
    "JSON value": ("j.jsonl", b'{"query": "a", "sku": ["b"]}', r'j.jsonl:1: sku is \["b"\], not a text or a number'),
    "surrogate": ("j.jsonl", b'{"query": "a\\ud800", "sku": "b"}', "column query, is not Unicode text"),
    "no Parquet": ("j.parquet", b"query,sku", "j.parquet cannot be read as Parquet"),
    "short qrels": ("qrels.txt", b"1 0 d 1\n1 0 d", "qrels.txt:2: QUERY_ID 0 PRODUCT GRADE expected, found 3 fields"),
    "unknown": ("j.docx", b"query", "j.docx has no known layout; give a .csv, .tsv, .jsonl or .parquet file"),
}


@pytest.mark.parametrize(("name", "content", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    if name == "qrels.txt":
        (tmp_path / "queries.tsv").write_text("1\ta\n")
    with pytest.raises(UserError, match=problem):
        read(tmp_path / name)


def test_a_path_without_one_file_of_judgements_is_refused(tmp_path):
    with pytest.raises(UserError, match="data.queries: .*missing.csv does not exist; give a .csv"):
        read(tmp_path / "missing.csv")
    with pytest.raises(UserError, match="holds no single file of judgements .found: nothing."):
        read(tmp_path)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("query,product\na,b")
    with pytest.raises(UserError, match="holds no single file of judgements .found: a.csv, b.csv."):
        read(tmp_path)


def test_topics_must_have_one_text_for_each_id(tmp_path):
    folder = trec_folder(tmp_path)
    for content, problem in (
        ("7\ta\n7\tb", "queries.tsv:2: query 7 occurs again with another text"),
        ("7\ta\nq2", r"queries.tsv:2: ID<TAB>TEXT expected, found 1 field\(s\)"),
        ("7\t", "queries.tsv:1: a query's id and its text expected"),
    ):
        (folder / "queries.tsv").write_text(content)
        with pytest.raises(UserError, match=problem):
            read(folder)


def test_training_needs_a_file_that_names_splits(tmp_path):
    found = read_lines(tmp_path, "query,product", "a,p")
    assert len(found.of_split("test")) == 1 and found.has_split("validation") and not found.has_split("train")
    with pytest.raises(UserError, match="no queries of the split 'train' .it names no splits.: add a"):
        read(tmp_path / "j.csv", "train")


IDS = st.text("ab \"\\é,;'", min_size=1, max_size=3).filter(lambda text: text.strip())
CELLS = st.tuples(IDS, IDS, st.integers(-1, 3), st.sampled_from(["", "train", "dev", "test"]), st.integers(0, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=30), st.sampled_from(["csv", "jsonl", "parquet"]), st.sets(IDS))
def test_judgements_and_their_alignment_equal_a_plain_loop(tmp_path_factory, rows, kind, gallery):
    path = tmp_path_factory.mktemp("random") / f"j.{kind}"
    names = ("query", "product", "grade", "split", "weight")
    if kind == "csv":
        path.write_text("\n".join(",".join(map(quoted, row)) for row in [names, *rows]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    else:
        parquet.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)
    order = {"": 0, "train": 1, "dev": 2, "test": 3}
    alike, split, grade, weight = {}, defaultdict(int), defaultdict(float), defaultdict(float)
    for query, product, row_grade, row_split, row_weight in rows:
        alike[query] = normalise(query)
        split[alike[query]] = max(split[alike[query]], order[row_split])
        grade[query, product] = max(grade[query, product], row_grade, 0)
        weight[query, product] += row_weight
    expected = {
        key: (grade[key], ["", "train", "validation", "test"][split[alike[key[0]]]], weight[key]) for key in grade
    }
    found = read(path)
    assert as_rows(found) == expected and len(found) == len(expected)
    assert found.texts == list(alike) and (np.diff(found.queries) >= 0).all()
    ids = sorted(gallery)
    aligned = found.of(ids)
    inside = {key: row for key, row in expected.items() if key[1] in gallery}
    columns = zip(aligned.queries, aligned.items, aligned.grades, aligned.weights, strict=True)
    assert {(found.texts[q], ids[i]): (g, found.splits[q], w) for q, i, g, w in columns} == inside
    assert sorted(zip(aligned.queries, aligned.items, strict=True)) == list(
        zip(aligned.queries, aligned.items, strict=True)
    )
    relevant = {query for (query, _), row in inside.items() if row[0] > 0}
    assert aligned.answerable.tolist() == [text in relevant for text in found.texts]
    assert aligned.missing_judgements == len(expected) - len(inside)
    assert aligned.missing_products == len({product for _, product in expected} - gallery)
    by_name = found.of({id_: place for place, id_ in enumerate(ids)})
    np.testing.assert_array_equal(by_name.items, aligned.items)


def test_runs_and_qrels_are_read_by_trec_eval(tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rows = (f"q{i % 7},p{i % 11},{i % 3}" for i in range(60))
    found, random = read_lines(tmp_path, "query,product,grade", *rows), np.random.default_rng(0)
    gallery = [f"p{i}" for i in range(14)]
    scores = -np.sort(-random.normal(size=(len(found.texts), 9)).astype(np.float32), axis=1)
    items = np.stack([random.permutation(14)[:9] for _ in found.texts])
    items[2, 5:] = -1
    write_run(tmp_path / "run", names_of(found), gallery, items, scores)
    write_qrels(tmp_path / "qrels", found)
    run = read_run(tmp_path / "run")
    assert run.query_ids == [str(i + 1) for i in range(7)] and len(run.product_ids[2]) == 5
    assert run.product_ids[0] == [gallery[i] for i in items[0]]
    np.testing.assert_array_equal(np.float32(run.scores[0]), scores[0])
    with (tmp_path / "run").open() as runs, (tmp_path / "qrels").open() as qrels:
        theirs = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(qrels), {"ndcg_cut_5"})
        values = theirs.evaluate(pytrec_eval.parse_run(runs))
    aligned = found.of(gallery)
    for query, ranking in enumerate(items):
        grades = np.zeros(14)
        grades[aligned.items[aligned.queries == query]] = aligned.grades[aligned.queries == query]
        discounts = 1 / np.log2(np.arange(2, 7))
        shown = np.where(ranking >= 0, grades[ranking], 0)
        expected = shown[:5] @ discounts / (-np.sort(-grades)[:5] @ discounts)
        assert values[str(query + 1)]["ndcg_cut_5"] == pytest.approx(expected, abs=1e-6)


def test_ids_that_trec_eval_cannot_read_are_refused(tmp_path):
    items, scores = np.zeros((1, 1), int), np.ones((1, 1))
    with pytest.raises(UserError, match="the product id 'a b' has white space or is empty, which trec_eval cannot"):
        write_run(tmp_path / "run", ["1"], ["a b"], items, scores)
    with pytest.raises(ValueError, match="items and scores of 2 queries expected"):
        write_run(tmp_path / "run", ["1", "2"], ["a"], items, scores)
    (tmp_path / "run").write_text("1 Q0 p 1 high tag\n")
    with pytest.raises(UserError, match="run:1: QUERY_ID Q0 PRODUCT RANK SCORE TAG expected"):
        read_run(tmp_path / "run")


@pytest.mark.skipif("JAXCLIP_REAL_DATA" not in os.environ, reason="JAXCLIP_REAL_DATA is not set")
def test_three_hundred_real_queries_find_their_products():
    folder = Path(os.environ["JAXCLIP_REAL_DATA"]) / "fashion-products-small"
    found = read(folder / "short_queries.csv")
    assert (len(found.texts), len(found), (found.grades == 2).sum()) == (300, 61377, 23374) and not found.oddities
    ids = [line.split(",")[0] for line in (folder / "styles.csv").read_text().splitlines()[1:]]
    aligned = found.of(ids)
    assert aligned.answerable.all() and not aligned.missing_products and len(aligned.items) == 61377
    half = found.of(ids[: len(ids) // 2])
    assert 0 < half.missing_products == len(set(found.product_ids) - set(ids[: len(ids) // 2]))


def test_texts_that_differ_in_case_or_spaces_are_in_one_split(tmp_path):
    found = read_lines(
        tmp_path, "query,product,split", "Red  Shirt,a,train", "red shirt,a,test", "hat,b,train", "bag,c,"
    )
    assert dict(zip(found.texts, found.splits, strict=True)) == {
        "Red  Shirt": "test", "red shirt": "test", "hat": "train", "bag": "",
    }  # fmt: skip
    assert found.of_split("train").texts == ["hat"] and "bag" in found.of_split("test").texts
