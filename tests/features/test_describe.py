"""Descriptions of products travel with them through a prepared dataset, whoever computed them."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxclip.catalog import builder
from jaxclip.catalog.builder import Source
from jaxclip.catalog.drawn import draw_catalogue
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


def described(raw, folder, describer, workers):
    builder.prepare(Source("drawn", raw, 20.0, 42, {}, describer), folder, progress=silently, workers=workers)
    records = Records(folder, "all")
    parsed = [records.parse(record) for record in records.read(np.arange(len(records)))]
    return {example["id"].numpy().decode(): {k: v.numpy() for k, v in example.items()} for example in parsed}


@pytest.fixture(scope="module")
def alone(raw, tmp_path_factory):
    return described(raw, tmp_path_factory.mktemp("prepared"), ProductDescriber(), 1)


@pytest.mark.slow
def test_processes_describe_what_one_process_describes(raw, alone, tmp_path):
    among_two = described(raw, tmp_path, ProductDescriber(), 2)
    assert among_two.keys() == alone.keys() and len(alone) == PRODUCTS
    for product, values in alone.items():
        assert values.keys() == among_two[product].keys()
        for name, value in values.items():
            np.testing.assert_array_equal(value, among_two[product][name], err_msg=f"{product}: {name}")


def test_every_column_is_stored_with_its_shape(alone):
    for name, column in ProductDescriber().columns.items():
        for values in alone.values():
            shape = np.shape(values[name])
            assert len(shape) == len(column.shape), name
            assert all(want in (None, have) for want, have in zip(column.shape, shape, strict=True)), name


def test_the_values_mean_what_they_say(alone):
    for values in alone.values():
        left, top, right, bottom = values["crops"][0]
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        np.testing.assert_allclose(values["geometry"][:2], [right - left, bottom - top], atol=1e-6)
        assert np.isclose(values["colour_shares"].sum(), 1, atol=1e-5) and (np.diff(values["colour_shares"]) <= 0).all()
        assert np.isclose(values["colour_histogram"].sum(), 1, atol=1e-4) and np.isfinite(values["texture"]).all()


def test_where_nothing_is_detected_the_crop_is_the_whole_picture_and_it_is_counted(raw, tmp_path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    values = described(raw, tmp_path / "p", ProductDescriber(detector=f"boxes:{boxes}"), 1)
    assert all((each["crops"] == [[0, 0, 1, 1]]).all() and not len(each["boxes"]) for each in values.values())
    assert builder.metadata(tmp_path / "p")["mended"][FELL_BACK] == PRODUCTS
    assert "nothing detected" in (tmp_path / "p" / "card.html").read_text()


def test_a_source_is_recognised_by_what_describes_it(raw):
    plain = Source("drawn", raw, 20.0, 42, {})
    keys = {replace(plain, describer=each).key() for each in (None, ProductDescriber(), ProductDescriber(colours=5))}
    assert len(keys) == 3
