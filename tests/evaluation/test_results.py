"""The result files of an evaluation, and the comparison of two evaluations."""

import csv
import json

import numpy as np
import pytest

from jaxclip.errors import UserError
from jaxclip.evaluation import protocols, results

PRODUCTS = 240


def write_evaluation(folder, noise, *, seed=0, data="d1", products=PRODUCTS):
    """Writes an evaluation whose texts are noisy image embeddings; returns its figures and its stored rankings."""
    random = np.random.default_rng(seed)
    images = np.random.default_rng(7).standard_normal((products, 16)).astype(np.float32)
    texts = images + noise * random.standard_normal(images.shape).astype(np.float32)
    images, texts = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts))
    groups = np.arange(products)
    figures, details = protocols.evaluate(
        *(protocols.GroupedEmbeddings(rows, groups) for rows in (texts, images)), ["shoes", "bags"] * (products // 2)
    )
    results.write_metrics(folder, figures)
    names = [f"p{number}" for number in groups]
    results.write_queries(folder, details, captions=names, owners=groups, ids=names, data_fingerprint=data)
    return figures, results.read_queries(folder)


def test_the_csv_tables_hold_the_figures_of_metrics_json(tmp_path):
    figures, stored = write_evaluation(tmp_path, 1.0)
    assert json.loads((tmp_path / "metrics.json").read_text())["text_to_image"] == figures["text_to_image"]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = {(row["direction"], row["metric"]): row for row in csv.DictReader(file) if row["protocol"] == "groups"}
    for direction in results.DIRECTIONS:
        for name, figure in figures[direction].items():
            assert float(rows[direction, name]["value"]) == pytest.approx(figure["value"], rel=1e-5)
    with (tmp_path / "queries.csv").open(newline="") as file:
        ranks = [int(row["rank"]) for row in csv.DictReader(file)]
    np.testing.assert_array_equal(ranks, stored.best_ranks)
    assert np.mean(np.asarray(ranks) <= 10) == pytest.approx(figures["text_to_image"]["hit@10"]["value"])
    with (tmp_path / "by_category.csv").open(newline="") as file:
        assert {row["category"] for row in csv.DictReader(file)} == {"bags", "shoes"}


def test_a_run_compared_with_itself_has_no_differences(tmp_path):
    _, stored = write_evaluation(tmp_path, 1.0)
    for rows in results.compare(stored, stored).values():
        for row in rows.values():
            assert row["difference"] == row["low"] == row["high"] == 0 and row["p"] == 1


def test_a_large_difference_is_significant_and_positive_if_the_second_run_is_better(tmp_path):
    worse_figures, worse = write_evaluation(tmp_path / "worse", 3.0)
    better_figures, better = write_evaluation(tmp_path / "better", 0.7)
    row = results.compare(worse, better)["text_to_image"]["hit@1"]
    assert row["baseline"] == pytest.approx(worse_figures["text_to_image"]["hit@1"]["value"])
    assert row["value"] == pytest.approx(better_figures["text_to_image"]["hit@1"]["value"])
    assert 0 < row["low"] <= row["difference"] <= row["high"] and row["p"] < 0.001


def test_evaluations_of_different_products_or_data_are_not_compared(tmp_path):
    _, one = write_evaluation(tmp_path / "one", 1.0)
    _, other_data = write_evaluation(tmp_path / "data", 1.0, data="d2")
    _, fewer = write_evaluation(tmp_path / "fewer", 1.0, products=PRODUCTS - 2)
    for other, fingerprint in ((other_data, "d2"), (fewer, "d1")):
        with pytest.raises(UserError, match=f"different products.*d1.*{fingerprint}"):
            results.compare(one, other)


def test_a_missing_evaluation_is_reported_by_its_file(tmp_path):
    with pytest.raises(UserError, match=r"queries\.npz is missing: evaluate the run of this folder first"):
        results.read_queries(tmp_path)
