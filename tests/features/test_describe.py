"""The features of products are stored in the prepared dataset, whichever process computed them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.catalog.describe import described_pictures
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.pictures import inspect
from jaxclip.catalog.product import Product
from jaxclip.features.describe import FELL_BACK, ProductDescriber
from jaxclip.pipeline.records import Records

PRODUCTS = 150


def silently(items, **_):
    return items


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "shop"
    draw_catalogue(folder, PRODUCTS, 0)
    return folder


def prepare(raw, folder, describer, workers):
    builder.prepare(Source("drawn", raw, 20.0, 42, {}, describer), folder, progress=silently, workers=workers)
    records = Records(folder, "all")
    parsed = [records.parse(record) for record in records.read(np.arange(len(records)))]
    return {example["id"].numpy().decode(): {k: v.numpy() for k, v in example.items()} for example in parsed}


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    return prepare(raw, tmp_path_factory.mktemp("prepared"), ProductDescriber(), 1)


@pytest.mark.slow
def test_two_processes_store_the_same_features_as_one(raw, prepared, tmp_path):
    by_two = prepare(raw, tmp_path, ProductDescriber(), 2)
    assert by_two.keys() == prepared.keys() and len(prepared) == PRODUCTS
    for product, values in prepared.items():
        assert values.keys() == by_two[product].keys()
        for name, value in values.items():
            np.testing.assert_array_equal(value, by_two[product][name], err_msg=f"{product}: {name}")


def test_every_column_is_stored_with_its_shape(prepared):
    for name, column in ProductDescriber().columns.items():
        for values in prepared.values():
            shape = np.shape(values[name])
            assert len(shape) == len(column.shape), name
            assert all(expected in (None, size) for expected, size in zip(column.shape, shape, strict=True)), name


def test_the_stored_values_are_consistent_and_in_range(prepared):
    for values in prepared.values():
        left, top, right, bottom = values["crops"][0]
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert not len(values["counts"])
        (shares,) = values["colour_shares"]
        assert np.isclose(shares.sum(), 1, atol=1e-5) and (np.diff(shares) <= 0).all()
        assert np.isclose(values["colour_histogram"].sum(), 1, atol=1e-4) and np.isfinite(values["texture"]).all()


def test_if_nothing_is_detected_the_crop_is_the_whole_picture_and_this_is_counted(raw, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    products = prepare(raw, tmp_path / "p", ProductDescriber(detector=f"boxes:{boxes}"), 1)
    assert all((row["crops"] == [[0, 0, 1, 1]]).all() and not len(row["boxes"]) for row in products.values())
    assert builder.metadata(tmp_path / "p")["mended"][FELL_BACK] == PRODUCTS
    assert "nothing detected" in (tmp_path / "p" / "card.html").read_text()


def test_the_key_of_a_source_depends_on_the_describer_and_its_settings(raw):
    plain = Source("drawn", raw, 20.0, 42, {})
    keys = {
        replace(plain, describer=describer).key()
        for describer in (None, ProductDescriber(), ProductDescriber(colours=5))
    }
    assert len(keys) == 3


def test_each_picture_of_a_product_has_its_own_boxes_and_crops_with_labels_and_colours(tmp_path):
    """Two pictures, red with two boxes and blue with one; the policy keeps two crops of each picture."""
    boxes = {"red.png": [("shirt", [0, 0, 20, 30]), ("shoe", [20, 30, 20, 30])], "blue.png": [("bag", [0, 0, 40, 30])]}
    names = {name: number for number, name in enumerate(("shirt", "shoe", "bag"))}
    for name in boxes:
        Image.new("RGB", (40, 60), name.partition(".")[0]).save(tmp_path / name)
    stored = {
        "images": [{"id": n, "file_name": name, "width": 40, "height": 60} for n, name in enumerate(boxes)],
        "annotations": [
            {"image_id": n, "category_id": names[label], "bbox": box, "score": 1 - 0.1 * rank}
            for n, found in enumerate(boxes.values())
            for rank, (label, box) in enumerate(found)
        ],
        "categories": [{"id": number, "name": name} for name, number in names.items()],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(stored))
    describe = ProductDescriber(detector=f"boxes:{tmp_path / 'boxes.json'}", policy="all:2", padding=0.0)
    paths = tuple(tmp_path / name for name in boxes)
    (description,) = describe([Product("1", paths, ())], [[inspect(path) for path in paths]])
    red, blue = described_pictures(description.values)
    assert red.box_labels == ["shirt", "shoe"] and blue.box_labels == ["bag"]
    assert [[crop.label for crop in picture.crops] for picture in (red, blue)] == [["shirt", "shoe"], ["bag"]]
    np.testing.assert_allclose(red.crops[1].box, [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(blue.boxes, [[0, 0, 1, 0.5]])
    assert {crop.colours[0][0] for crop in red.crops} == {"Red"} and blue.crops[0].colours[0][0] == "Blue"
    (alone,) = describe([Product("2", paths[1:], ())], [[inspect(paths[1])]])
    (only,) = described_pictures(alone.values)
    assert not len(alone.values["counts"]) and only.box_labels == ["bag"] and len(only.crops) == 1
