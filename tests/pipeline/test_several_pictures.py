"""Products with several pictures: what training draws, which crops and features belong to a picture, what is stored."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.catalog.dataset import Label, example
from jaxclip.catalog.describe import described_pictures
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.product import Product
from jaxclip.config.schema import Augmentation, Config
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline import images
from jaxclip.pipeline.batches import image_batches, training_batches
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.pipeline.words import TokenizedByCaption

PRODUCTS = 10  # product n has 1 + n % 5 pictures and two captions
PLAIN = Augmentation((1.0, 1.0), (1.0, 1.0), keep_attributes=1.0, keep_words=1.0)
FORMAT_1 = {None: 120_130, "foreground": 140_381}
"""Bytes of the records of 24 drawn products in format 1, in which a product had one picture, by detector."""


def silently(items, **_):
    return items


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A table with one row for each picture, and two boxes of each picture, of which the second is more certain."""
    folder = tmp_path_factory.mktemp("several")
    lines, listed, boxes = ["sku,image,caption,colour"], [], []
    for number in range(PRODUCTS):
        for index in range(1 + number % 5):
            name, size = f"{number}-{index}.png", (40 + 4 * index, 48)
            pixels = np.random.default_rng(10 * number + index).integers(0, 256, (6, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(folder / name)
            lines.append(f"p{number},{name},{('first', 'second')[index % 2]} name {number},shade{number}")
            listed.append({"id": len(listed), "file_name": name, "width": size[0], "height": size[1]})
            for box in ([0, 0, 8, 8], [10 + index, 4, 20, 30 + number]):
                label, score = (1, 0.9) if box[0] else (2, 0.6)
                boxes.append({"image_id": len(listed) - 1, "category_id": label, "bbox": box, "score": score})
        lines.append(f"p{number},{number}-0.png,other name {number},shade{number}")
    (folder / "products.csv").write_text("\n".join(lines))
    names = [{"id": 1, "name": "shirt"}, {"id": 2, "name": "bag"}]
    (folder / "boxes.json").write_text(json.dumps({"images": listed, "annotations": boxes, "categories": names}))
    return folder


@pytest.fixture(scope="module")
def records(shop, tmp_path_factory):
    describer = ProductDescriber(f"boxes:{shop / 'boxes.json'}", policy="all:2", padding=0.0)
    source = builder.Source("table", shop / "products.csv", 0, 0, {"product": "sku"}, describer)
    folder = tmp_path_factory.mktemp("prepared") / "several"
    builder.prepare(source, folder, progress=silently, workers=1)
    return Records(folder, "all")


@pytest.fixture(scope="module")
def numbers(records):
    """The number in its id of each record's product."""
    return [int(product.id[1:]) for product, _ in records.products()]


def preprocess(**changes):
    return Preprocess(32, "squash", (0.5,) * 3, (0.25,) * 3, "{name}", True, 16, **changes)


@pytest.fixture(scope="module")
def batches(records):
    tokenizer = train_tokenizer([caption for product, _ in records.products() for caption in product.captions], 300)

    def load(first, last, *, batch=PRODUCTS, seed=3, rows=None, **changes):
        config, encode = Config(seed=seed, batch_size=batch, augmentation=PLAIN), TokenizedByCaption(tokenizer, 16)
        return list(
            training_batches(records, encode, preprocess(**changes), config, steps=range(first, last), rows=rows)
        )

    return load


@pytest.fixture(scope="module")
def known(records, numbers):
    """The pixels of every picture -> (number of its product, index of the picture)."""
    pixels = np.concatenate(list(image_batches(records, preprocess(), batch_size=30)))
    places = records.picture_places
    assert len(places) == 30
    return {pixels[row].tobytes(): (numbers[record], index) for row, (record, index) in enumerate(places.tolist())}


def drawn(batches, known):
    return [known[picture.tobytes()] for batch in batches for picture in batch["image"]]


def test_every_picture_and_every_pair_of_picture_and_caption_is_drawn_about_equally_often(batches, known):
    epochs = 150
    loaded = batches(0, epochs)
    times = Counter(drawn(loaded, known))
    for number in range(PRODUCTS):
        count = 1 + number % 5
        found = np.array([times[number, index] for index in range(count)])
        assert found.sum() == epochs
        deviation = (epochs * (1 / count) * (1 - 1 / count)) ** 0.5
        assert (abs(found - epochs / count) <= 4 * deviation).all(), (number, found)
    texts = [row.tobytes() for batch in loaded for row in batch["text"]]
    pairs = Counter((place, text) for place, text in zip(drawn(loaded, known), texts, strict=True) if place[0] == 1)
    assert len(pairs) == 2 * 3 and max(pairs.values()) < 3 * min(pairs.values())


def test_the_picture_of_a_position_is_the_same_in_any_range_of_steps_batches_and_rows(batches, known):
    whole = drawn(batches(0, 12), known)
    assert drawn(batches(7, 12), known) == whole[70:]
    assert drawn(batches(0, 24, batch=5), known) == whole
    parts = [drawn(batches(2, 8, rows=rows), known) for rows in ([7, 8, 9], [0, 1, 2, 3, 4, 5, 6])]
    for step in range(6):
        joined = parts[1][7 * step : 7 * step + 7] + parts[0][3 * step : 3 * step + 3]
        assert joined == whole[20 + 10 * step : 30 + 10 * step]
    assert drawn(batches(0, 12, seed=4), known) != whole


def expected_box(number, index):
    """The more certain box of a picture, as shares of its sides."""
    width = 40 + 4 * index
    return np.array([(10 + index) / width, 4 / 48, (30 + index) / width, (34 + number) / 48], np.float32)


def test_towers_trained_on_crops_see_the_first_crop_of_the_drawn_picture(batches, records, numbers, known):
    parts = {}
    for number, (_, pictures) in zip(numbers, records.products_with_pictures(), strict=True):
        for index, (encoded, _) in enumerate(pictures):
            cut = images.cut(images.decode(encoded), expected_box(number, index))
            parts[number, index] = images.resize(cut, 32, "squash").numpy()
    crops = batches(0, 8, picture="crop")
    for place, crop in zip(
        drawn(batches(0, 8), known), np.concatenate([batch["image"] for batch in crops]), strict=True
    ):
        np.testing.assert_array_equal(crop, parts[place])
    embedded = np.concatenate(list(image_batches(records, preprocess(picture="crop"), batch_size=7)))
    for (record, index), crop in zip(records.picture_places.tolist(), embedded[:30], strict=True):
        np.testing.assert_array_equal(crop, parts[numbers[record], index])


def test_columns_are_those_of_the_first_crop_of_the_main_picture(records, numbers):
    columns = records.columns(["crops", "colour_histogram", "colour_names", "crop_labels", "texture"])
    assert columns["crops"].shape == (PRODUCTS, 4) and columns["texture"].ndim == 2
    for row, number in enumerate(numbers):
        np.testing.assert_allclose(columns["crops"][row], expected_box(number, 0), atol=1e-6)
        _, features = records.product_with_features(row)
        np.testing.assert_array_equal(columns["colour_histogram"][row], features["colour_histogram"][0])
        assert columns["colour_names"][row] == features["colour_names"][:3]
        assert columns["crop_labels"][row] == ("shirt",)


def test_pictures_have_their_best_crops_and_products_the_features_of_all_crops(records, numbers):
    for row, (product, pictures) in enumerate(records.products_with_pictures()):
        number, count = numbers[row], 1 + numbers[row] % 5
        assert [path.name for path in product.pictures] == [f"{number}-{index}.png" for index in range(count)]
        assert [encoded for encoded, _ in pictures] == records.pictures(row) and len(pictures) == count
        for index, (_, crop) in enumerate(pictures):
            np.testing.assert_allclose(crop, expected_box(number, index), atol=1e-6)
        same, features = records.product_with_features(row)
        assert same == product and not {"images", "pictures", "id"} & features.keys()
        assert features["crops"].shape == features["boxes"].shape == (2 * count, 4)
        assert features["colour_rgb"].shape == (2 * count, 3, 3) and len(features["colour_names"]) == 6 * count
        assert features["crop_labels"] == ("shirt", "bag") * count
        pictures = described_pictures(features)
        assert len(pictures) == count
        for index, picture in enumerate(pictures):
            assert [crop.label for crop in picture.crops] == ["shirt", "bag"] and len(picture.boxes) == 2
            np.testing.assert_allclose(picture.crops[0].box, expected_box(number, index), atol=1e-6)


def test_a_selection_has_the_pictures_of_its_products(records, numbers):
    chosen = np.array([6, 2, 9])
    assert records.take(chosen).picture_counts.tolist() == [1 + numbers[row] % 5 for row in chosen]
    whole = np.concatenate(list(image_batches(records, preprocess(), batch_size=30)))
    taken = np.concatenate(list(image_batches(records.take(chosen), preprocess(), batch_size=1)))
    rows = np.concatenate([np.flatnonzero(records.picture_owners == row) for row in chosen])
    np.testing.assert_array_equal(taken, whole[rows])
    main = np.concatenate(list(image_batches(records.main_pictures(), preprocess(), batch_size=PRODUCTS)))
    np.testing.assert_array_equal(main, whole[records.picture_places[:, 1] == 0])


@pytest.mark.parametrize("detector", FORMAT_1)
def test_records_are_no_larger_than_in_format_1_where_products_have_one_picture(tmp_path, detector):
    """Without features, a record has 17 bytes more: the file name of the picture, which format 1 did not have."""
    draw_catalogue(tmp_path / "raw", 24, 0)
    describer = ProductDescriber() if detector else None
    source = builder.Source("fashion_product_images", tmp_path / "raw", 0, 0, {}, describer)
    builder.prepare(source, tmp_path / "p", progress=silently, workers=1)
    records = Records(tmp_path / "p", "all")
    assert sum(map(len, records.read(np.arange(24)))) <= FORMAT_1[detector] + (0 if detector else 24 * 17)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1).map(lambda name: f"x{name}")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(["", "query", "gallery"])), min_size=1, max_size=5))
def test_names_and_roles_of_pictures_are_stored(pictures):
    names, roles = zip(*pictures, strict=True)
    product = Product("1", tuple(map(Path, names)), (), roles=roles if any(roles) else ())
    stored = json.loads(example(product, Label(0, "1", 0), [b""] * len(names), {})[1]["pictures"])
    assert stored == ([list(one) for one in pictures] if any(roles) else list(names))


def test_names_of_pictures_that_are_not_utf8_are_stored():
    product = Product("1", (Path("caf\udce9.jpg"),), ())
    stored = example(product, Label(0, "1", 0), [b""], {})[1]["pictures"]
    assert json.loads(stored.encode().decode()) == ["caf\udce9.jpg"]
