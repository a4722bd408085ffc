"""Products whose group was trained on are recognised in any later catalogue, and never ranked as unseen ones."""

import csv
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxclip import config as configs
from jaxclip.catalog import builder
from jaxclip.errors import UserError
from jaxclip.pipeline import trained_groups
from jaxclip.pipeline.prepared_data import training_records
from jaxclip.pipeline.records import Records


@dataclass(frozen=True)
class Item:
    """A product of the tests' catalogues; each picture has a number, which decides its pixels."""

    id: str
    caption: str
    pictures: tuple[int, ...]


# The last three share a caption, and the first three have two pictures, of which 101 is also the picture of another.
ITEMS = [
    *(Item(str(n), f"item {n} cotton shirt", (n, 100 + n)) for n in range(3)),
    *(Item(str(n), f"item {n} wool coat", (n,)) for n in range(3, 20)),
    Item("20", "item 20 linen scarf", (101,)),
    *(Item(str(n), "plain hat", (n,)) for n in range(21, 24)),
]


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)


def write_table(folder: Path, items, name="shop.csv", prefix="") -> Path:
    folder.mkdir(parents=True)
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "article", "image", "caption"])
        for item in items:
            for number in item.pictures:
                Image.fromarray(pixels(number)).save(folder / f"{prefix}{number}.png")
                rows.writerow([item.id, item.id, f"{prefix}{number}.png", item.caption])
    return folder / name


def write_folder(folder: Path, items) -> Path:
    folder.mkdir(parents=True)
    for item in items:
        for number in item.pictures:
            Image.fromarray(pixels(number)).save(folder / f"photo-{number}.png")
            (folder / f"photo-{number}.txt").write_text(item.caption)
    return folder


def prepare(path: Path, prepared: Path, *, test=6.0, seed=0, validation=-1.0, reader="table") -> Path:
    columns = {"product": "article"} if reader == "table" else {}
    source = builder.Source(reader, path, test, seed, columns, validation=validation)
    builder.prepare(source, prepared, progress=lambda items, **_: items)
    return prepared


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The prepared catalogue that a run was trained on."""
    folder = tmp_path_factory.mktemp("first")
    return prepare(write_table(folder / "raw", ITEMS), folder / "prepared")


@pytest.fixture(scope="module")
def keys(first):
    return trained_groups.keys_of(first, Records(first, "train"))


def marks(records):
    """Returns the normalised captions and the pixels of each record: what makes two products the same thing."""
    found = []
    for product, pictures in records.products_with_pictures():
        arrays = (np.asarray(Image.open(BytesIO(encoded)).convert("RGB")).tobytes() for encoded, _ in pictures)
        found.append({" ".join(caption.lower().split()) for caption in product.captions} | set(arrays))
    return found


def expected(prepared, trained_marks):
    """Returns the ids of the products of a catalogue that are, also indirectly, the same thing as a trained one."""
    records, seen = Records(prepared, "all"), set(trained_marks)
    products, of_product = [product.id for product, _ in records.products()], marks(records)
    known: set[int] = set()
    while True:
        more = {n for n, own in enumerate(of_product) if own & seen} - known
        if not more:
            return {products[n] for n in known}
        known |= more
        seen |= set().union(*(of_product[n] for n in more))


def renamed_titles(items):
    return [replace(item, caption=f"new name {n}") for n, item in enumerate(items)]


def renamed_ids(items):
    return [replace(item, id=f"sku/{(n * 7) % len(items)}") for n, item in enumerate(items)]


def other_pictures(items):
    return [replace(item, pictures=tuple(500 + n for n in item.pictures)) for item in items]


def shuffled_captions(items):
    """Captions and pictures of other products: every product is the same thing as two others."""
    return [replace(item, caption=other.caption) for item, other in zip(items, [*items[5:], *items[:5]], strict=True)]


NEW = [Item(f"new-{n}", f"new product {n}", (200 + n,)) for n in range(16)]
BRIDGES = [Item("bridge", ITEMS[4].caption, (200,)), *NEW]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "change",
    [
        lambda items: items,
        lambda items: [*items, *NEW],
        lambda items: [*renamed_titles(items), *NEW],
        lambda items: [*renamed_ids(items), *NEW],
        lambda items: [*other_pictures(items), *NEW],
        lambda items: [*shuffled_captions(items), *NEW],
        lambda items: [*items[:9], *BRIDGES],
    ],
    ids=["resplit", "added", "titles renamed", "ids renamed", "pictures replaced", "captions moved", "bridged"],
)
def test_no_product_that_is_the_same_thing_as_a_trained_one_is_ranked_as_unseen(first, keys, tmp_path, change, seed):
    trained_marks = set().union(*marks(Records(first, "train")))
    path = write_table(tmp_path / "raw", change(ITEMS), name="other.csv", prefix="renamed-")
    prepared = prepare(path, tmp_path / "prepared", seed=seed)
    same = expected(prepared, trained_marks)
    left_out = 0
    for split in ("train", "validation", "test", "all"):
        records = Records(prepared, split)
        ids = [product.id for product, _ in records.products()]
        lines = []
        found = trained_groups.is_trained_on(prepared, records, keys)
        assert [id_ in same for id_ in ids] == found.tolist()
        if split in ("validation", "test") and found.all():
            with pytest.raises(UserError, match=f"all {len(ids)} products of the split {split} of .* were trained on"):
                trained_groups.unseen_records(prepared, split, keys, lines.append)
            continue
        ranked, notes = trained_groups.unseen_records(prepared, split, keys, lines.append)
        assert notes == lines and any("were trained on" in note for note in notes) == found.any()
        if found.any():
            assert notes[0].startswith(f"{found.sum()} of {len(ids)} products of the split {split} are in groups that")
            assert ("left out" in notes[0]) == (split in ("validation", "test"))
        kept = [product.id for product, _ in ranked.products()]
        assert kept == [id_ for id_ in ids if split in ("train", "all") or id_ not in same]
        if split in ("validation", "test"):
            assert not set().union(*marks(ranked)) & trained_marks
            left_out += len(ids) - len(kept)
    assert same and (left_out or seed == 0), "the catalogue must have products that have to be left out"


def test_products_are_recognised_in_a_catalogue_with_another_reader(first, keys, tmp_path):
    path = write_folder(tmp_path / "raw", [*renamed_titles(ITEMS)[:12], *ITEMS[12:], *NEW])
    prepared = prepare(path, tmp_path / "prepared", reader="folder", test=12.0)
    trained_marks = set().union(*marks(Records(first, "train")))
    ranked, notes = trained_groups.unseen_records(prepared, "test", keys, lambda line: None)
    ids = {product.id for product, _ in Records(prepared, "test").products()}
    assert {product.id for product, _ in ranked.products()} == ids - expected(prepared, trained_marks)
    assert notes and 0 < len(ranked) < len(ids)


def test_a_catalogue_of_which_the_test_products_were_deleted_is_refused(first, keys, tmp_path):
    held_out = {product.id for split in ("validation", "test") for product, _ in Records(first, split).products()}
    path = write_table(tmp_path / "raw", [item for item in ITEMS if item.id not in held_out])
    prepared = prepare(path, tmp_path / "prepared", test=4.0, validation=0.0)
    with pytest.raises(UserError, match=r"all 4 products of the split test .* evaluate other products"):
        trained_groups.unseen_records(prepared, "test", keys, lambda line: None)
    records, notes = trained_groups.unseen_records(prepared, "all", keys, lambda line: None)
    assert len(records) == len(ITEMS) - len(held_out)
    assert notes == [f"{len(records)} of {len(records)} products of the split all are in groups that were trained on"]


def test_a_run_on_its_own_catalogue_leaves_nothing_out_and_reads_no_record(first, keys, monkeypatch):
    monkeypatch.setattr(Records, "groups", lambda self: pytest.fail("the records were read"))
    ranked, notes = trained_groups.unseen_records(first, "test", keys, lambda line: None)
    assert ranked.whole and not notes


def test_the_groups_of_a_part_of_the_training_products_are_only_those(first):
    names = np.array([product.id for product, _ in Records(first, "train").products()])
    part = Records(first, "train", 4)
    found = trained_groups.is_trained_on(first, Records(first, "train"), trained_groups.keys_of(first, part))
    same = expected(first, set().union(*marks(part)))
    assert set(names[found]) == same and 4 <= len(same) < len(names)


def test_products_reserved_for_a_reranker_are_no_training_products_of_the_towers(first, tmp_path):
    settings = {"steps": 1, "data": {"prepared": str(first), "second_stage": 3.0, "reader": "table"}}
    config = configs.build(settings)
    used, reserved = training_records(config, first)
    keys = trained_groups.known_groups(config, tmp_path, first, used, print)
    assert not trained_groups.is_trained_on(first, reserved, keys).any()
    assert trained_groups.is_trained_on(first, used, keys).all()
    assert len(used) + len(reserved) == len(Records(first, "train"))


def test_a_checkpoint_is_known_by_its_workdir_or_its_export_and_a_published_one_has_no_groups(keys, tmp_path):
    workdir, export, published, lines = tmp_path / "run", tmp_path / "export", tmp_path / "published", []
    for folder in (workdir, export, published):
        folder.mkdir()
    trained_groups.write(workdir, keys)
    assert trained_groups.copy(workdir, export) == export / "trained_groups.npy"
    for folder in (workdir, export):
        np.testing.assert_array_equal(trained_groups.of_checkpoint(str(folder), lines.append), keys)
    assert not len(trained_groups.of_checkpoint(str(published), lines.append)) and not lines
    assert not len(trained_groups.of_checkpoint("owner/name", lines.append)) and not lines
    assert not len(trained_groups.of_checkpoint("", lines.append)) and not lines
    (workdir / "trained_groups.npy").unlink()
    assert trained_groups.copy(workdir, published) is None
    (workdir / "preprocess.json").write_text("{}")
    assert not len(trained_groups.of_checkpoint(str(workdir), lines.append))
    assert lines == [
        f"{workdir} has no trained_groups.npy: products that it was trained on cannot be recognised in other catalogues"
    ]


def test_a_resumed_run_still_knows_the_groups_of_a_base_that_is_gone(first, keys, tmp_path):
    base, workdir = tmp_path / "base", tmp_path / "run"
    for folder in (base, workdir):
        folder.mkdir()
    trained_groups.write(base, keys)
    config = configs.build({"steps": 1, "model": {"init_from": str(base)}})
    part = Records(first, "validation")
    known = trained_groups.known_groups(config, workdir, first, part, print)
    assert len(known) == len(keys) + len(trained_groups.keys_of(first, part))
    trained_groups.write(workdir, known)
    (base / "trained_groups.npy").unlink()
    np.testing.assert_array_equal(trained_groups.known_groups(config, workdir, first, part, print), known)


def test_a_dataset_that_was_copied_without_its_keys_is_refused(first, keys, tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "catalogue").symlink_to(first / "catalogue")
    with pytest.raises(UserError, match=r"copy has no group_keys\.npz.*copy it from where the dataset was prepared"):
        trained_groups.unseen_records(tmp_path / "copy", "test", keys, print)


def evaluated(prepared, keys, **data):
    lines = []
    config = configs.build({"steps": 1, "data": {"reader": "table", "prepared": str(prepared), **data}})
    return *trained_groups.evaluated_records(config, prepared, keys, lines.append), lines


def test_training_chooses_on_validation_reports_test_and_says_what_is_left_out_of_both(first, keys, tmp_path):
    test, notes, validation, lines = evaluated(first, keys)
    assert (test.split, validation.split, notes, lines) == ("test", "validation", [], [])
    test, notes, validation, _ = evaluated(first, keys, split="validation")
    assert test is validation and notes == [trained_groups.CHOSEN_ON]
    prepared = prepare(write_table(tmp_path / "raw", [*ITEMS, *NEW]), tmp_path / "prepared", test=12.0, seed=5)
    test, notes, validation, lines = evaluated(prepared, keys)
    assert len(test) < len(Records(prepared, "test")) and len(validation) < len(Records(prepared, "validation"))
    assert [line.split("split ")[1].split()[0] for line in lines] == ["test", "validation"] and len(notes) == 1


def test_without_a_validation_split_there_is_nothing_to_choose_by_and_training_says_so(keys, tmp_path):
    prepared = prepare(write_table(tmp_path / "raw", NEW), tmp_path / "prepared", validation=0.0)
    test, _, validation, lines = evaluated(prepared, keys)
    assert validation is None and test.split == "test"
    assert lines == []
    config = configs.build({"steps": 1, "evaluation": {"every": 5}, "data": {"reader": "table", "prepared": "p"}})
    trained_groups.evaluated_records(config, prepared, keys, lines.append)
    assert lines == ["there is no validation split: the split test is ranked, and no checkpoint is the best"]


def test_a_validation_split_that_was_trained_on_is_refused_with_what_to_do(first, tmp_path):
    keys = trained_groups.keys_of(first, Records(first, "validation"))
    with pytest.raises(UserError, match=r"split validation .* --config\.data\.split_seed, .*data\.validation=0"):
        evaluated(first, keys)


def test_the_test_split_does_not_depend_on_validation_which_is_as_large_and_never_divides_a_group(tmp_path):
    path, splits = write_table(tmp_path / "raw", [*ITEMS, *NEW]), {}
    for name, validation in (("default", -1.0), ("none", 0.0), ("share", 0.25), ("number", 3.0)):
        prepared = prepare(path, tmp_path / name, validation=validation)
        splits[name] = {split: {p.id: group for p, group in Records(prepared, split).products()}
                        for split in builder.metadata(prepared)["splits"]}  # fmt: skip
        groups = [set(ids.values()) for ids in splits[name].values()]
        assert sum(map(len, groups)) == len(set().union(*groups)), "a group is in two splits"
    assert [splits[name]["test"] for name in splits] == [splits["default"]["test"]] * 4
    sizes = {name: [len(of[split]) if split in of else 0 for split in ("train", "validation", "test")]
             for name, of in splits.items()}  # fmt: skip
    assert sizes == {"default": [28, 6, 6], "none": [34, 0, 6], "share": [24, 10, 6], "number": [31, 3, 6]}
    with pytest.raises(UserError, match=r"set data\.validation to a share or a number"):
        prepare(path, tmp_path / "much", validation=34.0)
