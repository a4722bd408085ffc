"""Judged queries replace a share of the training texts, as a pure function of (seed, position)."""

import numpy as np
import pytest

from jaxclip.catalog.judgements import read
from jaxclip.config import build
from jaxclip.config.schema import Augmentation, Config, Data
from jaxclip.errors import UserError
from jaxclip.pipeline import text
from jaxclip.pipeline.batches import training_batches
from jaxclip.pipeline.judged_queries import JudgedQueries, find_judged_queries, judged_queries, uniform_draws
from jaxclip.pipeline.order import shuffled
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.words import TokenizedByCaption
from jaxclip.runtime.tensorflow import tf

BATCH, STEPS = 4, 50
ROWS = [  # query, product, grade, split, clicks
    ("Cotton", "1", 2, "train", 3),
    ("cotton", "2", 4, "train", 1),
    ("shade", "2", 1, "train", 1),
    ("shade", "3", 0, "train", 1),
    ("shade", "4", 2, "train", 0),
    ("item", "5", 4, "test", 1),
    *(("shirt", str(number), 1, "train", 2) for number in range(6, 20)),
]


@pytest.fixture(scope="module")
def records(prepared):
    return Records(prepared, "train")


@pytest.fixture(scope="module")
def ids(records):
    return [product.id for product, _ in records.products()]


@pytest.fixture(scope="module")
def judgements(tmp_path_factory):
    path = tmp_path_factory.mktemp("judged") / "judged.csv"
    lines = [",".join(map(str, row)) for row in [("query", "product", "grade", "split", "clicks"), *ROWS]]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def judged(judgements, ids, tokenizer, preprocess):
    return judged_queries(read(judgements, "train"), ids, tokenizer, preprocess)


@pytest.fixture(scope="module")
def batches(records, tokenizer, preprocess, judged):
    """Returns the batches of some steps as a list; without queries if `share` is None."""

    def load(first, last, share=0.6, *, seed=3, batch=BATCH, rows=None):
        augmentation = Augmentation((1.0, 1.0), (1.0, 1.0), queries=share or 0.0)
        config, steps = Config(seed=seed, batch_size=batch, augmentation=augmentation), range(first, last)
        encode = TokenizedByCaption(tokenizer, preprocess.context_length)
        plain = training_batches(records, encode, preprocess, config, steps=steps, rows=rows)
        order = shuffled(len(records), seed)
        return list(plain if share is None else judged.mixed_into(plain, config, order, steps=steps, rows=rows))

    return load


def rows_of(batches):
    return [{name: batch[name][row] for name in batch} for batch in batches for row in range(len(batch["group"]))]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_row_has_a_query_of_its_product_with_its_weight_or_keeps_its_caption(
    batches, records, ids, tokenizer, preprocess
):
    texts = [text.caption(query, {}, preprocess) for query in ("cotton", "shade", "shirt")]
    tokens = text.encode(tokenizer, texts, preprocess.context_length)
    expected = {(ids.index("1"), 0): 2 / 4 * 3, (ids.index("2"), 0): 1.0, (ids.index("2"), 1): 1 / 4}
    expected |= {(ids.index(i), 2): 1 / 4 * 2 for i in map(str, range(6, 20)) if i in ids}
    expected = {key: weight for key, weight in expected.items() if key[0] < len(ids)}
    number_of = {group: number for number, (_, group) in enumerate(records.products())}
    seen = set()
    for row, plain in zip(rows_of(batches(0, STEPS)), rows_of(batches(0, STEPS, None)), strict=True):
        assert row["query"].dtype == np.int32 and row["weight"].dtype == np.float32
        np.testing.assert_array_equal(row["image"], plain["image"])
        if row["query"] < 0:
            np.testing.assert_array_equal(row["text"], plain["text"])
            assert row["weight"] == 1
        else:
            key = number_of[int(row["group"])], int(row["query"])
            np.testing.assert_array_equal(row["text"], tokens[key[1]])
            assert row["weight"] == pytest.approx(expected[key])
            seen.add(key)
    assert seen == expected.keys()


def test_the_share_of_queries_among_products_that_have_any_is_the_configured_one(batches, judged):
    answers = (np.diff(judged.starts) > 0).mean()
    for share in (0.25, 1.0):
        found = np.mean([row["query"] >= 0 for row in rows_of(batches(0, 20 * 19, share))])
        assert found == pytest.approx(share * answers, abs=0.03 if share < 1 else 1e-9)


def test_each_query_of_a_product_is_drawn_equally_often_at_any_share():
    tokens = np.arange(8, dtype=np.int32).reshape(4, 2)
    only = JudgedQueries(tokens, np.asarray([0, 4]), np.arange(4, dtype=np.int32), np.ones(4, np.float32))
    config = Config(batch_size=8000, augmentation=Augmentation(queries=0.3))
    plain = [{"text": np.full((8000, 2), -1, np.int32)}]
    (batch,) = only.mixed_into(plain, config, tf.zeros_like, steps=range(5, 6))
    counts = np.bincount(batch["query"] + 1, minlength=5)
    assert abs(counts - 8000 * np.asarray([0.7, *[0.3 / 4] * 4])).max() < 5 * 1700**0.5
    np.testing.assert_array_equal(batch["text"], np.where(batch["query"][:, None] < 0, -1, tokens[batch["query"]]))
    assert (plain[0]["text"] == -1).all()  # the batch that was given is unchanged


def test_batches_are_a_pure_function_of_seed_and_position(batches):
    whole = batches(0, 12)
    assert_same(batches(7, 12), whole[7:])
    assert_same(rows_of(batches(0, 24, batch=2)), rows_of(whole))
    parts = [batches(2, 8, rows=rows) for rows in np.split(np.arange(BATCH), 2)]
    joined = [{n: np.concatenate([p[n] for p in step]) for n in step[0]} for step in zip(*parts, strict=True)]
    assert_same(joined, whole[2:8])
    queries = [[row["query"] for row in rows_of(batches(0, 19, seed=seed))] for seed in (3, 4)]
    assert queries[0] != queries[1]


def test_draws_are_uniform_independent_and_those_of_splitmix64():
    draws = uniform_draws(-7, np.arange(40_000))
    assert draws.shape == (2, 40_000) and draws.min() >= 0 and draws.max() < 1
    edges = np.linspace(0, 1, 9)
    counts = np.histogram2d(*draws, bins=[edges, edges])[0]
    assert abs(counts - 625).max() < 5 * 625**0.5
    assert abs(np.corrcoef(draws[0, 1:], draws[0, :-1])[0, 1]) < 0.02
    assert len(np.unique(draws)) > 79_990

    def mixed(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    state = mixed(-7 % 2**64)
    exact = [mixed((state + (2 * 123 + i) * 0x9E3779B97F4A7C15) % 2**64) / 2**64 for i in (0, 1)]
    np.testing.assert_allclose(uniform_draws(-7, np.asarray([123]))[:, 0], exact, rtol=1e-12)


def test_queries_are_looked_for_only_if_they_are_trained_on(records, judgements, tokenizer, preprocess, judged):
    lines = []
    for share in (0.0, 0.5):
        config = Config(augmentation=Augmentation(queries=share), data=Data(queries=str(judgements)))
        found = find_judged_queries(config, records, tokenizer, preprocess, lines.append)
        assert (found is None) == (not share)
    assert found.fingerprint() == judged.fingerprint()
    assert len(lines) == 1 and "training products are answers to 3 judged queries; 50% of their pairs" in lines[0]


def test_training_on_queries_needs_their_file_but_evaluating_such_a_run_does_not(records, tokenizer, preprocess):
    trained = build({"steps": 1, "augmentation": {"queries": 0.5}})
    with pytest.raises(UserError, match=r"augmentation\.queries = 0\.5 needs data\.queries, the file with the"):
        find_judged_queries(trained, records, tokenizer, preprocess, print)


def test_queries_of_another_catalogue_are_refused(records, tmp_path, tokenizer, preprocess):
    (tmp_path / "other.csv").write_text("query,product,split\nred,SKU-1,train\nblue,1,test\n")
    config = Config(augmentation=Augmentation(queries=0.5), data=Data(queries=str(tmp_path / "other.csv")))
    with pytest.raises(UserError, match="none of the 19 training products is an answer .* products are named SKU-1, "):
        find_judged_queries(config, records, tokenizer, preprocess, print)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["info_nce", "incorrect_pairs"])
def test_a_run_trains_on_judged_queries(run, config_file, shop, tmp_path, read_rows, loss):
    ids = [line.split(",")[0] for line in (shop / "styles.csv").read_text().splitlines()[1:]]
    rows = [f"query {number % 7},{id_},{1 + number % 3},train" for number, id_ in enumerate(ids)]
    (tmp_path / "judged.csv").write_text("\n".join(["query,product,grade,split", *rows]))
    data = {"reader": "fashion_product_images", "path": shop, "queries": tmp_path / "judged.csv"}
    flags = [f"--config.data.{name}={value}" for name, value in data.items()]
    flags += ["--config.augmentation.queries=0.7", f"--config.loss.name={loss}"]
    flags += ["--config.loss.queue=16"] if loss == "info_nce" else []
    done = run("train", f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 0, done.stderr
    assert "training products are answers to 7 judged queries; 70% of their pairs" in done.stdout + done.stderr
    assert "judged.csv has no queries of the split test: there are no figures" in done.stdout + done.stderr
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert losses and np.isfinite(losses).all()
