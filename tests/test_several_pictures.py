"""Products with several pictures through the commands: prepare, train, evaluate, query, search, re-rank (slow)."""

import json
import shutil

import numpy as np
import pytest

import jaxclip
from jaxclip.catalog import builder
from jaxclip.pipeline.records import Records

pytestmark = pytest.mark.slow
RERANKER = """
from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.task, config.first_stage = "rerank", "{towers}"
    config.batch_size, config.steps = 8, 10
    config.data = ConfigDict({{"reader": "deepfashion_inshop", "path": "{catalogue}", "test": 0.15}})
    config.data.second_stage = 20
    config.features = ConfigDict({{"policy": "all:2"}})
    config.rerank = ConfigDict({{"candidates": 8, "wordings": 1, "preset": "gated", "hidden": 64}})
    config.optimizer = ConfigDict({{"warmup_steps": 1, "learning_rate": 0.01}})
    return config
"""


@pytest.fixture(scope="module")
def catalogue(inshop):
    return ["--config.data.reader=deepfashion_inshop", f"--config.data.path={inshop}", "--config.data.test=0.15"]


@pytest.fixture(scope="module")
def towers(run, config_file, catalogue, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "towers"
    flags = [*catalogue, "--config.steps=20", "--config.features.policy=all:2", "--config.data.second_stage=20"]
    done = run("train", f"--config={config_file}", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    assert "60 products in 60 groups" in done.stderr and "150 pictures" in done.stderr
    return workdir


def read_metrics(workdir, name):
    return json.loads((workdir / "eval" / name / "metrics.json").read_text())


def test_image_to_image_asks_with_the_photos_of_the_benchmark_s_queries(run, towers, inshop):
    done = run("evaluate", f"--workdir={towers}", "--config.data.split=all")
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(towers, "all")
    assert metrics["gallery"] == 60
    rows = [row.split() for row in (inshop / "Eval/list_eval_partition.txt").read_text().splitlines()[2:]]
    shown = {item for _, item, role in rows if role == "gallery"}
    asked = sum(role == "query" and item in shown for _, item, role in rows)
    similar = metrics["image_to_image"]
    assert similar["queries"] == asked and similar["gallery"] == len(shown)
    assert "image-to-image" in done.stdout


def test_a_query_s_sheet_shows_products_once(run, towers):
    done = run("evaluate", f"--workdir={towers}", "--query=white dress")
    assert done.returncode == 0, done.stderr
    sheets = list((towers / "eval").rglob("*.html"))
    assert any("white dress" in sheet.read_text() for sheet in sheets)


def test_photos_as_products_have_one_picture_each(run, catalogue, tmp_path):
    done = run("prepare", *catalogue, "--config.data.product=photo", f"--config.data.prepared={tmp_path / 'p'}")
    assert done.returncode == 0, done.stderr
    facts = builder.metadata(tmp_path / "p")
    assert (facts["products"], facts["pictures"], facts["groups"]) == (150, 150, 60)
    assert Records(tmp_path / "p", "test").one_picture_each


def test_a_re_ranker_trains_evaluates_and_searches_and_a_second_photo_finds_its_product(run, towers, inshop, tmp_path):
    config, reranker = tmp_path / "config.py", tmp_path / "reranker"
    config.write_text(RERANKER.format(towers=towers, catalogue=inshop))
    for command in (["train", f"--config={config}"], ["evaluate"]):
        done = run(*command, f"--workdir={reranker}")
        assert done.returncode == 0, done.stderr
    assert read_metrics(reranker, "test")["gallery"] == 9
    workdir = tmp_path / "run"
    shutil.copytree(towers, workdir)
    searcher = jaxclip.load(workdir)
    assert len(searcher.gallery) == 60 and searcher.vectors.shape[0] == 150
    for number in range(60):
        for picture in searcher.gallery.pictures(number)[1:]:
            (first, *_) = searcher.search(image=picture, k=5)
            assert first.id == searcher.gallery.ids[number] and first.score == pytest.approx(1, abs=1e-3)
    reranked = jaxclip.load(workdir, rerank=reranker).search("white dress", k=8)
    ids = [row.id for row in reranked]
    assert len(set(ids)) == 8 and np.isfinite([row.score for row in reranked]).all()
