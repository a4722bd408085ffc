"""The order of training is a pure function of (seed, step); evaluation yields every picture once, in order."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.config.schema import Augmentation, Config
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.models.resampling import scale
from jaxclip.pipeline import images
from jaxclip.pipeline.batches import Partners, image_batches, training_batches
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.words import TokenizedByCaption

TOTAL, BATCH = 19, 4
AUGMENTED = Augmentation((0.3, 0.9), (0.5, 2.0), flip=True, keep_attributes=0.5, keep_words=0.5)
PLAIN = Augmentation((1.0, 1.0), (1.0, 1.0))


@pytest.fixture(scope="module")
def batches(prepared, preprocess, tokenizer):
    """Returns what training_batches yields, as a list."""
    records = Records(prepared, "train")

    def load(first, last, *, batch=BATCH, seed=3, rows=None, augmentation=AUGMENTED):
        config = Config(seed=seed, batch_size=batch, augmentation=augmentation)
        return list(
            training_batches(records, by_caption(tokenizer), preprocess, config, steps=range(first, last), rows=rows)
        )

    return load


def by_caption(tokenizer, context_length=16):
    return TokenizedByCaption(tokenizer, context_length)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "text", "group"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def order_of(batches):
    return np.concatenate([batch["group"] for batch in batches])


def test_a_batch_has_the_promised_shapes(batches):
    (batch,) = batches(0, 1)
    assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
        "image": ((4, 32, 32, 3), "uint8"),
        "text": ((4, 16), "int32"),
        "group": ((4,), "int32"),
    }


def test_batches_from_a_later_step_equal_the_tail_of_all_batches(batches):
    whole = batches(0, 12)
    assert len(whole) == 12
    assert_same(batches(7, 12), whole[7:])
    assert_same(batches(0, 12), whole)


def test_every_epoch_has_every_record_once_in_a_different_order(batches):
    order = order_of(batches(0, 3 * TOTAL))  # 12 epochs of 19 records; epochs start in the middle of a batch
    epochs = order.reshape(-1, TOTAL)
    assert all(len(set(epoch)) == TOTAL for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_different_seed_gives_a_different_order(batches):
    orders = {tuple(order_of(batches(0, 4, seed=seed, augmentation=PLAIN))) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("count", [2, 4])
def test_the_rows_of_all_processes_form_the_global_batch(batches, count):
    parts = [batches(2, 8, rows=rows) for rows in np.split(np.arange(BATCH), count)]
    steps = zip(*parts, strict=True)
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]
    assert_same(joined, batches(2, 8))


def test_the_batch_size_changes_neither_order_nor_augmentation(batches):
    def rows(batches):
        return [{name: batch[name][row] for name in batch} for batch in batches for row in range(len(batch["group"]))]

    assert_same(rows(batches(0, 10, batch=2)), rows(batches(0, 5, batch=4)))


def test_an_epoch_of_one_record_works(prepared, preprocess, tokenizer, batches, monkeypatch):
    monkeypatch.setattr(Records, "__len__", lambda self: 1)
    assert len(set(order_of(batches(0, 3, batch=1)))) == 1


def test_augmentation_differs_between_positions_of_the_same_record(batches):
    seen = {}
    for batch in batches(0, 30):
        for row, group in enumerate(batch["group"]):
            seen.setdefault(int(group), []).append((batch["image"][row].tobytes(), batch["text"][row].tobytes()))
    pictures = [len({picture for picture, _ in views}) / len(views) for views in seen.values()]
    texts = [len({text for _, text in views}) for views in seen.values()]
    assert min(pictures) == 1.0
    assert np.mean(texts) > 2


def test_without_augmentation_training_pictures_equal_evaluation_pictures(batches, prepared, preprocess):
    records = Records(prepared, "train")
    groups = [group for _, group in records.products()]
    pictures = np.concatenate(list(image_batches(records, preprocess, batch_size=5)))[:TOTAL]
    for batch in batches(0, 10, augmentation=PLAIN):
        for row, group in enumerate(batch["group"]):
            np.testing.assert_array_equal(batch["image"][row], pictures[groups.index(group)])


def test_picture_and_caption_of_a_row_belong_to_the_same_product(batches, prepared, tokenizer):
    products = Records(prepared, "train").products()
    names = {group: f" item {product.id} cotton shirt shade{product.id}" for product, group in products}
    for batch in batches(0, 6, augmentation=PLAIN):
        for tokens, group in zip(batch["text"], batch["group"], strict=True):
            assert tokenizer.decode(tokens, skip_special_tokens=True) == names[group]


@pytest.mark.parametrize("size", [1, 4, 5, 7])
def test_evaluation_yields_every_picture_once_in_order_and_pads_with_black(prepared, preprocess, size):
    records = Records(prepared, "test")
    single = np.concatenate(list(image_batches(records, preprocess, batch_size=1)))
    batches = list(image_batches(records, preprocess, batch_size=size))
    assert {batch.shape for batch in batches} == {(size, 32, 32, 3)}
    rows = np.concatenate(batches)
    assert len(rows) == -(-5 // size) * size
    np.testing.assert_array_equal(rows[:5], single)
    assert (rows[5:] == 0).all()


def test_towers_trained_on_crops_get_the_prepared_crops_in_training_and_evaluation(
    raw, preprocess, tokenizer, tmp_path
):
    """The detector reads boxes from a file; each box is a quarter of its picture."""
    corners = [(x, y) for x in (0, 1) for y in (0, 1)]
    pictures = sorted(path for path in raw.iterdir() if path.suffix != ".csv")
    sizes = [Image.open(path).size for path in pictures]
    boxes = {
        "images": [
            {"id": n, "file_name": path.name, "width": width, "height": height}
            for n, (path, (width, height)) in enumerate(zip(pictures, sizes, strict=True))
        ],
        "annotations": [
            {
                "image_id": n,
                "category_id": 1,
                "bbox": [corners[n % 4][0] * w / 2, corners[n % 4][1] * h / 2, w / 2, h / 2],
            }
            for n, (w, h) in enumerate(sizes)
        ],
        "categories": [{"id": 1, "name": "shirt"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    describer = ProductDescriber(f"boxes:{tmp_path / 'boxes.json'}", padding=0.0)
    source = builder.Source("table", raw / "products.csv", 24 - TOTAL, 0, {}, describer)
    builder.prepare(source, tmp_path / "p", progress=lambda items, **_: items, workers=1)
    records, crops = Records(tmp_path / "p", "train"), replace(preprocess, picture="crop")
    expected = {}
    for product, ((picture, box),) in records.products_with_pictures():
        part = images.cut(images.decode(picture), box)
        expected[int(product.group)] = images.resize(part, crops.image_size, crops.resize).numpy()
    config = Config(seed=0, batch_size=TOTAL, augmentation=PLAIN)
    (batch,) = training_batches(records, by_caption(tokenizer), crops, config, steps=range(1))
    for group, picture in zip(batch["group"], batch["image"], strict=True):
        np.testing.assert_array_equal(picture, expected[int(group)])
    (unscaled,) = training_batches(records, by_caption(tokenizer), crops, config, steps=range(1), canvas=96)
    scaled = np.asarray(scale(unscaled["image"], unscaled["extent"], crops.image_size, "bicubic"), int)
    assert (unscaled["extent"] != crops.image_size).any() and np.abs(scaled - batch["image"]).mean() < 0.5
    (seen,) = image_batches(records, crops, batch_size=TOTAL)
    np.testing.assert_array_equal(seen, list(expected.values()))
    (requested,) = image_batches(records, preprocess, batch_size=TOTAL, crops=True)
    np.testing.assert_array_equal(requested, seen)
    (whole,) = image_batches(records, preprocess, batch_size=TOTAL)
    assert all((one != other).any() for one, other in zip(whole, seen, strict=True))


def test_towers_trained_on_crops_need_a_dataset_with_crops(prepared, preprocess):
    records = Records(prepared, "train")
    with pytest.raises(UserError, match="has no crops, on which the towers are trained"):
        next(image_batches(records, replace(preprocess, picture="crop"), batch_size=4))


def test_a_process_reads_only_its_own_rows(batches, monkeypatch):
    read = []
    whole = Records.read
    monkeypatch.setattr(Records, "read", lambda self, numbers: read.extend(numbers) or whole(self, numbers))
    batches(0, 4, rows=np.asarray([1, 2]))
    half = sorted(read)
    read.clear()
    batches(0, 4)
    assert len(half) == 8 and len(read) == 16 and set(half) < set(read)


def test_evaluation_on_several_processes_yields_the_rows_of_one_process(prepared, preprocess):
    records = Records(prepared, "test")
    whole = list(image_batches(records, preprocess, batch_size=4))
    shares = np.asarray([0, 3]), np.asarray([1, 2])
    parts = [list(image_batches(records, preprocess, batch_size=4, rows=rows)) for rows in shares]
    for number, batch in enumerate(whole):
        for rows, part in zip(shares, parts, strict=True):
            np.testing.assert_array_equal(part[number], batch[rows])


def test_split_all_concatenates_the_splits(prepared):
    splits = {split: [p.id for p, _ in Records(prepared, split).products()] for split in ("train", "test", "all")}
    assert sorted(splits["all"], key=int) == [str(number) for number in range(24)]
    assert sorted(splits["train"] + splits["test"]) == sorted(splits["all"])
    records = Records(prepared, "all")
    numbers = np.asarray([23, 0, 18, 19, 5, 0])
    ids = [records.parse(one)["id"].numpy().decode() for one in records.read(numbers)]
    assert ids == [splits["all"][number] for number in numbers]


def test_the_groups_of_a_record_are_the_same_in_every_split(prepared):
    everywhere = {product.id: group for product, group in Records(prepared, "all").products()}
    for split in ("train", "test"):
        assert all(everywhere[product.id] == group for product, group in Records(prepared, split).products())


def test_an_error_names_a_missing_split(raw, tmp_path):
    whole = builder.Source("table", raw / "products.csv", 0, 0, {})
    builder.prepare(whole, tmp_path / "whole", progress=lambda items, **_: items)
    with pytest.raises(UserError, match=r"no split 'test', only whole: .*--config\.data\.split=all"):
        Records(tmp_path / "whole", "test")
    assert len(Records(tmp_path / "whole", "all")) == 24


def test_context_length_and_picture_size_follow_the_preprocessing(prepared, preprocess, tokenizer):
    other = replace(preprocess, image_size=16, context_length=6, resize="crop")
    records = Records(prepared, "train")
    config = Config(seed=0, batch_size=2, augmentation=AUGMENTED)
    (batch,) = training_batches(records, by_caption(tokenizer, 6), other, config, steps=range(1))
    assert batch["image"].shape == (2, 16, 16, 3) and batch["text"].shape == (2, 6)


def make_partners(total, without=()):
    partner = (np.arange(total) + 5) % total
    partner[list(without)] = -1
    similarity = np.linspace(-0.5, 0.5, total).astype(np.float32)
    similarity[list(without)] = np.nan
    return Partners(partner, similarity)


def test_partners_add_texts_and_similarities_and_change_nothing_else(batches, prepared, preprocess, tokenizer):
    records, table = Records(prepared, "train"), make_partners(TOTAL, without=(2, 7))
    products = list(records.products())
    number_of = {group: number for number, (_, group) in enumerate(products)}
    config = Config(seed=3, batch_size=BATCH, augmentation=PLAIN)
    paired = list(training_batches(records, by_caption(tokenizer), preprocess, config, table, steps=range(1, 11)))
    left_out = 0
    for batch, without in zip(paired, batches(1, 11, augmentation=PLAIN), strict=True):
        for name in without:
            np.testing.assert_array_equal(batch[name], without[name])
        assert {name: batch[name].dtype.name for name in batch.keys() - without.keys()} == {
            "incorrect_text": "int32",
            "similarity": "float32",
            "has_incorrect": "bool",
        }
        for row, group in enumerate(batch["group"]):
            number = number_of[int(group)]
            has_partner = number not in (2, 7)
            other = products[table.partner[number] if has_partner else number][0].id
            text = tokenizer.decode(batch["incorrect_text"][row], skip_special_tokens=True)
            assert text == f" item {other} cotton shirt shade{other}"
            assert batch["has_incorrect"][row] == has_partner
            assert batch["similarity"][row] == (table.similarity[number] if has_partner else 1.0)
            left_out += not has_partner
    assert left_out >= 3


def test_incorrect_texts_are_augmented_independently_and_resume_exactly(prepared, preprocess, tokenizer):
    records, itself = Records(prepared, "train"), Partners(np.arange(TOTAL), np.zeros(TOTAL, np.float32))

    def load(first, last, rows=None):
        config, steps = Config(seed=3, batch_size=BATCH, augmentation=AUGMENTED), range(first, last)
        return list(
            training_batches(records, by_caption(tokenizer), preprocess, config, itself, steps=steps, rows=rows)
        )

    whole = load(0, 10)
    different = [(batch["text"] != batch["incorrect_text"]).any(axis=1).mean() for batch in whole]
    assert np.mean(different) > 0.5
    for one, other in zip(load(6, 10), whole[6:], strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    first, second = np.split(np.arange(BATCH), 2)
    parts = zip(load(0, 4, first), load(0, 4, second), strict=True)
    for (first, second), batch in zip(parts, whole, strict=False):
        np.testing.assert_array_equal(
            np.concatenate([first["incorrect_text"], second["incorrect_text"]]), batch["incorrect_text"]
        )


def test_an_empty_non_finite_or_mismatched_table_of_pairs_is_an_error(prepared, preprocess, tokenizer):
    with pytest.raises(UserError, match="is empty: none of its 4 products has a partner"):
        Partners(np.full(4, -1), np.full(4, np.nan, np.float32))
    with pytest.raises(UserError, match="1 similarities .* are not finite; the first is inf, of product 2"):
        Partners(np.asarray([1, 0, 3, -1]), np.asarray([0.1, 0.1, np.inf, np.nan], np.float32))
    records, other = Records(prepared, "train"), make_partners(7)
    with pytest.raises(UserError, match=f"has 7 products, but the split has {TOTAL}: delete incorrect_pairs/"):
        training_batches(records, by_caption(tokenizer), preprocess, Config(batch_size=2), other, steps=range(1))
