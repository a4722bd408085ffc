"""Preparation on Apache Beam gives the same dataset as local preparation: examples, order, splits and data card."""

import csv
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline.records import Records

pytest.importorskip("apache_beam")
from jaxclip.catalog import parts  # noqa: E402

PRODUCTS = 60


def silently(items, **_):
    return items


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """60 products; picture 0 is missing, 1 truncated, 2 not a picture, 3 plain white, 4 CMYK; 5 and 40 are equal."""
    folder = tmp_path_factory.mktemp("raw") / "shop"
    draw_catalogue(folder, PRODUCTS, 0)
    with (folder / "styles.csv").open(newline="") as file:
        pictures = [folder / "images" / f"{row['id']}.jpg" for row in csv.DictReader(file)]
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:200])
    pictures[2].write_text("<html>404</html>")
    Image.new("RGB", (60, 80), "white").save(pictures[3])
    with Image.open(pictures[4]) as image:
        image.convert("CMYK").save(pictures[4], "JPEG")
    pictures[40].write_bytes(pictures[5].read_bytes())
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART", 16)


def prepare(raw, folder, describer, test=12.0, **execution):
    source = Source("fashion_product_images", raw, test, 42, {}, describer)
    builder.prepare(source, folder, progress=silently, workers=1, **execution)
    return folder


def examples(folder, split):
    """Returns a split's examples, parsed because the format does not fix the order of fields in bytes."""
    records = Records(folder, split)
    return [tf.train.Example.FromString(each) for each in records.read(np.arange(len(records)))]


@pytest.mark.slow
@pytest.mark.parametrize("describer", (None, ProductDescriber()), ids=("plain", "described"))
@pytest.mark.parametrize("test", (12.0, 0))
def test_the_direct_runner_writes_the_same_examples_order_and_splits(raw, tmp_path, describer, test):
    local = prepare(raw, tmp_path / "local", describer, test)
    beam = prepare(raw, tmp_path / "beam", describer, test, runner="DirectRunner")
    facts = builder.metadata(local)
    assert builder.metadata(beam) == facts
    assert facts["dropped"] == {"image missing": 1, "image truncated": 1, "not an image": 1}
    assert facts["splits"] == ({"train": 45, "test": 12} if test else {"whole": 57})
    for split in facts["splits"]:
        assert examples(beam, split) == examples(local, split)
    assert (beam / builder.CARD).read_bytes() == (local / builder.CARD).read_bytes()
    assert sorted(path.name for path in beam.rglob("*")) == sorted(path.name for path in local.rglob("*"))


@pytest.mark.slow
def test_workers_in_separate_processes_give_the_same_dataset(raw, tmp_path):
    local = prepare(raw, tmp_path / "local", ProductDescriber())
    options = ("direct_num_workers=2", "--direct_running_mode=multi_processing")
    beam = prepare(raw, tmp_path / "beam", ProductDescriber(), runner="DirectRunner", beam_options=options)
    assert builder.metadata(beam) == builder.metadata(local)
    for split in ("train", "test"):
        assert examples(beam, split) == examples(local, split)


@pytest.mark.slow
def test_a_failing_worker_leaves_no_files(raw, tmp_path):
    with pytest.raises(Exception, match="no.such.file.json"):
        prepare(raw, tmp_path / "p", ProductDescriber(detector="boxes:no such file.json"), runner="DirectRunner")
    assert not (tmp_path / "p").exists()


def test_an_unknown_runner_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="--runner=Dirct"):
        prepare(Path("/nowhere"), tmp_path / "p", None, runner="Dirct")
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_the_prepare_command_accepts_a_runner_and_its_options(raw, tmp_path, run):
    prepared = tmp_path / "p"
    catalogue = ("--config.data.reader=fashion_product_images", f"--config.data.path={raw}", "--config.data.test=12")
    done = run(
        "prepare", *catalogue, f"--config.data.prepared={prepared}", "--runner=DirectRunner", "--beam_option=job_name=a"
    )
    assert done.returncode == 0, done.stderr
    assert builder.metadata(prepared)["products"] == PRODUCTS - 3
    wrong = run("prepare", *catalogue, f"--config.data.prepared={tmp_path / 'q'}", "--runner=Dirct")
    assert wrong.returncode == 2 and wrong.stderr.splitlines()[-1].startswith(
        "error: --runner=Dirct is not an installed Apache Beam runner"
    )
