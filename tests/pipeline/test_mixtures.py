"""Catalogues prepared as one: ids, groups and splits are made over all of them, and weights order training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from jaxclip import config as configs
from jaxclip.catalog import builder
from jaxclip.errors import UserError
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records

OUR_SIZE, THEIR_SIZE = 40, 24


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Two tables in files of equal names and with equal ids; the first also has products 0-9 of the second."""

    def write(folder, rows):
        folder.mkdir()
        lines = ["id,image,caption"]
        for number, (seed, caption) in enumerate(rows):
            pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 50)).save(folder / f"{number}.png")
            lines.append(f"{number},{number}.png,{caption}")
        (folder / "products.csv").write_text("\n".join(lines))
        return folder / "products.csv"

    root = tmp_path_factory.mktemp("mixed")
    ours = [(number, f"ours {number}") for number in range(OUR_SIZE)]
    theirs = [(100 + number, f"theirs {number}") for number in range(THEIR_SIZE)]
    theirs[:5] = [(3 * number, f"renamed {number}") for number in range(5)]  # the same pictures
    theirs[5:10] = [(200 + number, f"OURS  {3 * number}") for number in range(5, 10)]  # the same captions
    return write(root / "ours", ours), write(root / "theirs", theirs)


def mixture(tables, weights=(3, 1), readers=("table", "table"), **data):
    sources = tuple(zip(readers, map(str, tables), weights, strict=True))
    defaults = {"sources": sources, "test": 0.2, "image_size": 32, "workers": 1}
    settings = {"data": defaults | data, "features": {"detector": "none"}, "model": {"preset": "tiny"}, "steps": 1}
    return configs.build(settings)


@pytest.fixture(scope="module")
def prepared(tables, cache):
    return prepared_data.prepared_dataset(mixture(tables), say=lambda line: None)


def products_of(prepared, split="all"):
    return list(Records(prepared, split).products())


def test_catalogues_with_equal_file_names_have_different_names(tables, prepared):
    products = products_of(prepared)
    assert len(products) == OUR_SIZE + THEIR_SIZE
    names = [product.source for product, _ in products]
    assert (names.count("products"), names.count("products-2")) == (OUR_SIZE, THEIR_SIZE)
    assert prepared.name.startswith("mixture-") and builder.metadata(prepared)["source"]["parts"] == {
        "products": ["table", str(tables[0])],
        "products-2": ["table", str(tables[1])],
    }
    thrice = prepared_data.source_names(mixture((tables[0], tables[0].parent / "products-2.csv", tables[1]), (1, 2, 3),
                                                ("table", "table", "table")))  # fmt: skip
    assert list(thrice) == ["products", "products-2", "products-3"] and [w for *_, w in thrice.values()] == [1, 2, 3]


def test_ids_that_repeat_over_catalogues_are_numbered_and_counted(prepared):
    ids = {(product.source, product.id) for product, _ in products_of(prepared)}
    ours = {("products", str(number)) for number in range(OUR_SIZE)}
    assert ids == ours | {("products-2", f"{number}-2") for number in range(THEIR_SIZE)}
    assert sum(builder.metadata(prepared)["mended"].values()) == THEIR_SIZE


def test_a_product_in_two_catalogues_is_one_group_and_never_in_two_splits(prepared):
    groups = {(product.source, product.id): group for product, group in products_of(prepared)}
    for number in range(10):
        assert groups["products-2", f"{number}-2"] == groups["products", str(3 * number)]
    assert len(set(groups.values())) == OUR_SIZE + THEIR_SIZE - 10
    splits = [{group for _, group in products_of(prepared, split)} for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set(groups.values())) and all(splits)
    assert len(Records(prepared, "test")) == 13


def test_groups_that_readers_state_do_not_collide(tmp_path):
    """Two catalogues of the same layout name two articles id_0 and id_1; their photos are products, so groups."""
    sources = []
    for shop in ("ours", "theirs"):
        rows, entries = ["4", "image_name item_id evaluation_status"], []
        for number in range(4):
            name, article = f"img/MEN/Denim/id_{number % 2}/0{number}_1_front.jpg", f"id_{number % 2}"
            picture = tmp_path / shop / "Img" / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 40), (60 * number, 200 * (shop == "ours"), 9)).save(picture)
            rows.append(f"{name} {article} train")
        for number in range(2):
            entries.append({"item": f"id_{number}", "color": "Red", "description": [f"{shop} {number}"]})
        for name, content in (
            ("Eval/list_eval_partition.txt", "\n".join(rows)),
            ("Anno/list_description_inshop.json", json.dumps(entries)),
        ):
            (tmp_path / shop / name).parent.mkdir(parents=True)
            (tmp_path / shop / name).write_text(content)
        sources.append(tmp_path / shop)
    config = mixture(sources, readers=["deepfashion_inshop"] * 2, product="photo", test=0.5, validation=0)
    prepared = prepared_data.prepared_dataset(config, say=lambda line: None)
    groups = [(product.source, group) for product, group in products_of(prepared)]
    assert len(groups) == 8 and len({group for _, group in groups}) == len(set(groups)) == 4


def test_training_draws_each_catalogue_by_its_weight(tables, prepared):
    records = Records(prepared, "train")
    sources = np.array(records.sources())
    for weights, share in (((3, 1), 0.75), ((1, 4), 0.2)):
        order = prepared_data.training_order(mixture(tables, weights), records)
        drawn = sources[order(tf.range(2000, dtype=tf.int64)).numpy()]
        assert (drawn == "products").mean() == share


def test_a_selection_of_records_has_its_own_order(tables, prepared):
    config = mixture(tables, second_stage=0.3)
    records, reserved = prepared_data.training_records(config, prepared)
    assert len(records) + len(reserved) == len(Records(prepared, "train")) and len(reserved)
    drawn = prepared_data.training_order(config, records)(tf.range(1000, dtype=tf.int64)).numpy()
    assert set(drawn) == set(range(len(records)))
    assert (np.array(records.sources())[drawn] == "products").mean() == 0.75


def test_a_prepared_mixture_is_used_without_its_catalogues_but_only_with_the_same_ones(tables, tmp_path):
    config = mixture(tables, prepared=str(tmp_path / "p"))
    prepared_data.prepared_dataset(config, say=lambda line: None)
    moved = [tmp_path / name / "products.csv" for name in ("a", "b")]
    found = prepared_data.prepared_dataset(mixture(moved, prepared=str(tmp_path / "p")), say=lambda line: None)
    assert found == tmp_path / "p"
    for other in (tables[::-1], (*tables, tables[0])):
        changed = mixture(other, [1] * len(other), ["table"] * len(other), prepared=str(tmp_path / "p"))
        with pytest.raises(UserError, match=r"was prepared with other settings: data\.sources was "):
            prepared_data.prepared_dataset(changed, say=lambda line: None)


def test_errors_name_the_field(tables, prepared, tmp_path):
    with pytest.raises(UserError, match=r"no catalogue at /nowhere/b\.csv; set --config\.data\.sources to "):
        prepared_data.prepared_dataset(mixture((tables[0], Path("/nowhere/b.csv"))), say=lambda line: None)
    with pytest.raises(UserError, match=r"data\.sources: the reader 'excel' "):
        mixture(tables, readers=("table", "excel"))
    with pytest.raises(UserError, match=r"data\.sources: the weight of .* is 0.*, but must be greater than 0"):
        mixture(tables, weights=(1, 0))
    with pytest.raises(
        UserError, match=r"data\.sources names several catalogues: leave data\.path .* set data\.sources=\(\)"
    ):
        mixture(tables, path=str(tables[0]), reader="table")
    records = Records(prepared, "train")
    one = records.take(np.flatnonzero(np.array(records.sources()) == "products"))
    with pytest.raises(UserError, match=r"data\.sources: products-2 has no training products"):
        prepared_data.training_order(mixture(tables), one)


def test_another_weight_is_another_configuration_but_the_same_dataset(tables, prepared):
    config, other = mixture(tables), mixture(tables, weights=(3, 2))
    assert configs.fingerprint(config) != configs.fingerprint(other)
    assert prepared_data.prepared_dataset(other, say=lambda line: None) == prepared
    assert [line for line in configs.differences(config, other) if line.startswith("data.sources")]
    same = replace(config, data=replace(config.data, sources=config.data.sources))
    assert not configs.differences(config, same)
