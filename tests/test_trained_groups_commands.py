"""Whole commands on catalogues that changed after training: no figure counts a product whose group was trained on."""

import csv
import json
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxclip
from jaxclip import config
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.evaluation.results import read_queries
from jaxclip.pipeline import prepared_data, trained_groups
from jaxclip.pipeline.records import Records

pytestmark = pytest.mark.slow

PRODUCTS, TEST = 64, 12
SMALL = (
    "--config.batch_size=8", "--config.steps=4", "--config.evaluation.every=2", "--config.data.reader=table",
    f"--config.data.test={TEST}", "--config.augmentation.keep_attributes=1", "--config.augmentation.keep_words=1",
)  # fmt: skip
RERANKER = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task, config.first_stage = "rerank", "{towers}"
    config.batch_size, config.steps = 4, 2
    config.rerank = ConfigDict({{"candidates": 8, "wordings": 1, "hidden": 16}})
    config.optimizer = ConfigDict({{"warmup_steps": 1, "learning_rate": 0.01}})
    return config
"""


def write_table(path: Path, rows):
    """Writes a catalogue; rows are (id, picture, caption)."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "image", "caption"), *rows])
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The products of the catalogue: drawn pictures with captions of their own."""
    folder = tmp_path_factory.mktemp("shop")
    draw_catalogue(folder / "drawn", PRODUCTS, 3)
    pictures = sorted((folder / "drawn" / "images").iterdir())
    return [(f"p{n}", str(path), f"article {n} in drawer {n % 7}") for n, path in enumerate(pictures)]


@pytest.fixture(scope="module")
def shop(rows, tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("catalogue") / "shop.csv", rows)


@pytest.fixture(scope="module")
def train(run, config_file, tmp_path_factory):
    """A function that trains towers on a table and returns their workdir and what the command printed on stderr."""

    def train(path, *overrides, config=config_file):
        workdir = tmp_path_factory.mktemp("runs") / "run"
        arguments = [f"--config={config}", f"--workdir={workdir}", *SMALL, f"--config.data.path={path}", *overrides]
        done = run("train", *arguments)
        assert done.returncode == 0, done.stderr
        return workdir, done.stderr

    return train


@pytest.fixture(scope="module")
def towers(train, shop):
    """The workdir of towers, for which products of the training split were held back for a re-ranker."""
    return train(shop, "--config.data.second_stage=12")[0]


def things(records):
    """Returns the captions and the pixels of some records: what makes two products the same thing."""
    found = set()
    for product, pictures in records.products_with_pictures():
        found |= {caption.lower() for caption in product.captions}
        found |= {np.asarray(Image.open(BytesIO(encoded)).convert("RGB")).tobytes() for encoded, _ in pictures}
    return found


def trained_things(workdir):
    own = config.load_config(workdir)
    prepared = prepared_data.prepared_dataset(own, whole=False, say=pytest.fail)
    return things(prepared_data.training_records(own, prepared)[0])


def things_of_ids(settings, ids):
    """Returns the things of the products with these ids in the catalogue of a configuration."""
    records = Records(prepared_data.prepared_dataset(settings, whole=False, say=pytest.fail), "all")
    names = [product.id for product, _ in records.products()]
    return things(records.take(np.flatnonzero(np.isin(names, ids))))


@pytest.fixture
def evaluate(run, tmp_path):
    """A function that evaluates a copy of a workdir; returns the ranked ids, metrics.json and the command's output."""

    def evaluate(workdir, *overrides, name="test"):
        copy = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns("eval", "embeddings"))
        done = run("evaluate", f"--workdir={copy}", *overrides)
        assert done.returncode == 0, done.stderr
        folder = copy / "eval" / name
        return read_queries(folder).ids.tolist(), json.loads((folder / "metrics.json").read_text()), done

    return evaluate


@pytest.fixture(scope="module")
def changed(rows, towers, tmp_path_factory):
    """The catalogue without the products that were test products, with half of the others under other names."""
    own = config.load_config(towers)
    prepared = prepared_data.prepared_dataset(own, whole=False, say=pytest.fail)
    gone = {product.id for product, _ in Records(prepared, "test").products()}
    left = [row for row in rows if row[0] not in gone]
    pictures = tmp_path_factory.mktemp("renamed")
    renamed = []
    for number, (_, path, caption) in enumerate(left):
        shutil.copy(path, pictures / f"{number}.jpg")
        renamed.append((f"sku {number}", str(pictures / f"{number}.jpg"), f"new {number}" if number % 2 else caption))
    return write_table(tmp_path_factory.mktemp("changed") / "shop.csv", renamed)


def test_a_run_on_its_own_catalogue_ranks_its_whole_test_split_and_says_nothing(towers, evaluate):
    ids, metrics, done = evaluate(towers)
    assert len(ids) == TEST and metrics["notes"] == [] and "trained on" not in done.stderr
    assert not things_of_ids(config.load_config(towers), ids) & trained_things(towers)


def test_test_products_of_a_changed_catalogue_are_ranked_only_if_their_groups_were_not_trained_on(
    towers, changed, evaluate
):
    ids, metrics, done = evaluate(towers, f"--config.data.path={changed}", name="shop.csv-test")
    (note,) = metrics["notes"]
    assert 0 < len(ids) < TEST
    left_out = TEST - len(ids)
    assert (
        note == f"{left_out} of {TEST} products of the split test are in groups that were trained on and are left out"
    )
    assert note in done.stderr and note in done.stdout
    assert metrics["gallery"] == len(ids) == metrics["queries"]
    own = config.load_config(towers, {"data.path": str(changed)})
    assert not things_of_ids(own, ids) & trained_things(towers)


def test_the_whole_catalogue_is_ranked_with_the_number_of_products_that_were_trained_on(towers, changed, evaluate):
    overrides = (f"--config.data.path={changed}", "--config.data.split=all")
    ids, metrics, done = evaluate(towers, *overrides, name="shop.csv-all")
    seen, count = trained_things(towers), 0
    own = config.load_config(towers, {"data.path": str(changed), "data.split": "all"})
    records = Records(prepared_data.prepared_dataset(own, say=pytest.fail), "all")
    for number in range(len(records)):
        count += bool(things(records.take(np.array([number]))) & seen)
    note = f"{count} of {PRODUCTS - TEST} products of the split all are in groups that were trained on"
    assert len(ids) == PRODUCTS - TEST and metrics["notes"] == [note] and note in done.stdout and count > 0


def test_an_evaluation_of_which_nothing_is_left_is_refused(run, towers, tmp_path):
    own = config.load_config(towers)
    records, _ = prepared_data.training_records(own, prepared_data.prepared_dataset(own, say=pytest.fail))
    for number, (product, pictures) in enumerate(records.products_with_pictures()):
        (tmp_path / f"{number}.jpg").write_bytes(pictures[0][0])
        (tmp_path / f"{number}.txt").write_text(product.captions[0] if number % 2 else f"renamed {number}")
    done = run("evaluate", f"--workdir={towers}", "--config.data.reader=folder", f"--config.data.path={tmp_path}")
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert f"all {TEST} products of the split test of" in done.stderr and "data.split=all" in done.stderr


def test_search_names_the_products_that_were_trained_on_and_leaves_them_out_of_a_test_split(towers, tmp_path):
    workdir, lines = tmp_path / "run", []
    shutil.copytree(towers, workdir)
    everything = jaxclip.load(workdir, say=lines.append)
    count = len(prepared_data.training_records(config.load_config(towers), prepared_data.prepared_dataset(
        config.load_config(towers), say=pytest.fail))[0])  # fmt: skip
    assert f"{count} of {PRODUCTS} products of the split all are in groups that were trained on" in lines
    assert len(everything.gallery) == PRODUCTS
    other = jaxclip.load(workdir, overrides={"data.split": "test", "data.split_seed": "7"}, say=lines.append)
    left_out = TEST - len(other.gallery)
    assert any(line.startswith(f"{left_out} of {TEST} products of the split test") for line in lines)
    own = config.load_config(towers, {"data.split_seed": "7"})
    assert left_out and not things_of_ids(own, other.gallery.ids) & trained_things(towers)


def test_runs_on_two_splits_are_compared_on_products_that_neither_was_trained_on(run, train, towers, shop, tmp_path):
    other, _ = train(shop, "--config.data.split_seed=7")
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(towers, one)
    shutil.copytree(other, two)
    done = run("evaluate", "--compare", one, two, "--config.data.split_seed=3", "--config.data.test=24")
    assert done.returncode == 0, done.stderr
    assert "are in groups that were trained on and are left out" in done.stderr
    (comparison,) = two.glob("eval/*/against-one/comparison.json")
    folders = [next(w.glob("eval/test-test-24-split_seed-3")) for w in (one, two)]
    ids = [read_queries(folder).ids.tolist() for folder in folders]
    assert ids[0] == ids[1] and 0 < len(ids[0]) < 24
    own = config.load_config(one, {"data.split_seed": "3", "data.test": "24"})
    assert not things_of_ids(own, ids[0]) & (trained_things(one) | trained_things(two))
    content = json.loads(comparison.read_text())
    assert content["text_to_image"] and "left out" in content["notes"][0]


def test_a_run_that_begins_with_another_knows_its_training_products_too(
    run, train, towers, shop, continued_file, evaluate, tmp_path
):
    second, said = train(
        shop, f"--config.model.init_from={towers}", "--config.data.split_seed=11", config=continued_file
    )
    assert "products of the split test are in groups that were trained on and are left out" in said
    assert "products of the split validation are in groups that were trained on and are left out" in said
    for name in ("test", "zero_shot"):
        metrics = json.loads((second / "eval" / name / "metrics.json").read_text())
        assert metrics["gallery"] < TEST and "left out" in metrics["notes"][0]
        ids = read_queries(second / "eval" / name).ids
        assert not things_of_ids(config.load_config(second), ids) & (trained_things(second) | trained_things(towers))
    assert set(trained_groups.read(towers)) < set(trained_groups.read(second))
    ids, _, _ = evaluate(second)
    assert len(ids) == metrics["gallery"]
    output = tmp_path / "as it is"
    arguments = [f"--config={continued_file}", f"--config.model.init_from={towers}", f"--output={output}", *SMALL[3:5]]
    done = run("evaluate", *arguments, f"--config.data.path={shop}", "--config.data.split_seed=11")
    assert done.returncode == 0, done.stderr
    ids = read_queries(output).ids
    assert 0 < len(ids) < TEST and not things_of_ids(config.load_config(second), ids) & trained_things(towers)


def test_a_reranker_leaves_out_what_it_and_its_towers_were_trained_on(run, towers, evaluate, tmp_path):
    (tmp_path / "rerank.py").write_text(RERANKER.format(towers=towers))
    workdir = tmp_path / "reranker"
    done = run("train", f"--config={tmp_path / 'rerank.py'}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    own = config.load_config(towers)
    seen, held_back = prepared_data.training_records(own, prepared_data.prepared_dataset(own, say=pytest.fail))
    assert set(read_queries(workdir / "eval" / "test").ids) == set(read_queries(towers / "eval" / "test").ids)
    ids, metrics, done = evaluate(workdir, "--config.data.split_seed=7", name="test-split_seed-7")
    assert 0 < len(ids) < TEST and metrics["notes"][0] in done.stdout
    other = config.load_config(workdir, {"data.split_seed": "7"})
    assert not things_of_ids(other, ids) & (things(seen) | things(held_back))
    (workdir / "trained_groups.npy").unlink()  # as of a re-ranker that an earlier version trained
    refused = run("evaluate", f"--workdir={workdir}", "--config.data.split_seed=7", "--name=mine")
    assert refused.returncode == 2 and "has no trained_groups.npy by which they could be recognised" in refused.stderr
