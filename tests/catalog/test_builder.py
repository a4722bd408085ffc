"""Preparation writes a complete dataset or nothing; dropped and mended products are counted."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import builder, card
from jaxclip.catalog.builder import Source
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.product import Product
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError
from jaxclip.pipeline.records import Records

ROOT = Path(__file__).parents[2]
PRODUCTS = 40


def silently(items, **_):
    return items


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """40 drawn products; pictures 0-2 are unusable, 3 is CMYK, 4 and 5 are the same picture, 6-8 have the same name."""
    folder = tmp_path_factory.mktemp("raw") / "shop"
    draw_catalogue(folder, PRODUCTS, 0)
    with (folder / "styles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = [folder / "images" / f"{row['id']}.jpg" for row in rows]
    pictures[0].unlink()
    pictures[1].write_bytes(pictures[1].read_bytes()[:200])
    pictures[2].write_text("<html>404</html>")
    with Image.open(pictures[3]) as image:
        image.convert("CMYK").save(pictures[3], "JPEG")
    pictures[5].write_bytes(pictures[4].read_bytes())
    for row, name in zip(rows[6:9], ("Puma Bag", "  puma   BAG", "Puma Bag"), strict=True):
        row["productDisplayName"] = name
    with (folder / "styles.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    return folder


def source(raw, test=8.0, seed=42):
    return Source("fashion_product_images", raw, test, seed, {})


def rows_of(raw):
    with (raw / "styles.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "shop"
    builder.prepare(source(raw), folder, progress=silently)
    return folder


def test_dropped_products_are_counted_by_kind(prepared):
    facts = builder.metadata(prepared)
    assert facts["dropped"] == {"image missing": 1, "image truncated": 1, "not an image": 1}
    assert facts["products"] == PRODUCTS - 3
    assert facts["splits"] == {"train": PRODUCTS - 3 - 8, "test": 8}
    assert (prepared / "card.html").exists()


def test_a_split_never_divides_a_group_and_has_the_configured_size(prepared):
    products = {split: list(Records(prepared, split).products()) for split in ("train", "test")}
    groups = {split: {group for _, group in members} for split, members in products.items()}
    assert not groups["train"] & groups["test"]
    assert len(products["test"]) == 8
    assert len(groups["train"] | groups["test"]) == builder.metadata(prepared)["groups"]


def test_products_with_the_same_name_or_picture_are_one_group(prepared, raw):
    ids = [row["id"] for row in rows_of(raw)]
    group_of = {product.id: group for product, group in Records(prepared, "all").products()}
    assert group_of[ids[4]] == group_of[ids[5]]
    assert len({group_of[ident] for ident in ids[6:9]}) == 1
    assert group_of[ids[4]] != group_of[ids[6]]


@pytest.mark.parametrize(("test", "size"), [(0.25, 9), (1, 1), (20.0, 20)])
def test_the_test_split_has_the_configured_number_or_share(raw, tmp_path, test, size):
    builder.prepare(source(raw, test), tmp_path / "p", progress=silently)
    assert len(Records(tmp_path / "p", "test")) == size


def test_records_equal_the_products_of_the_reader(prepared, raw):
    read = {item.id: item for item in READERS["fashion_product_images"](raw, {}) if isinstance(item, Product)}
    cmyk = rows_of(raw)[3]["id"]
    records = Records(prepared, "all")
    for number, (product, group) in enumerate(records.products()):
        original = read[product.id]
        assert product == replace(original, pictures=(Path(original.pictures[0].name),), group=str(group))
        (picture,) = records.pictures(number)
        if product.id == cmyk:
            assert Image.open(BytesIO(picture)).mode == "RGB"
        else:
            assert picture == original.pictures[0].read_bytes()
        parsed = records.parse(records.read(np.asarray([number]))[0])
        assert parsed["images"].numpy().tolist() == [picture] and parsed["id"].numpy().decode() == product.id
        assert [caption.decode() for caption in parsed["captions"].numpy()] == list(original.captions)
        assert json.loads(parsed["attributes"].numpy()) == original.attributes


def test_the_fingerprint_changes_with_a_name_or_the_split_only(raw, prepared, tmp_path):
    builder.prepare(source(raw), tmp_path / "again", progress=silently)
    fingerprint = builder.metadata(prepared)["fingerprint"]
    assert builder.metadata(tmp_path / "again")["fingerprint"] == fingerprint
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "images").symlink_to(raw / "images")
    styles = (raw / "styles.csv").read_text().replace("Puma Bag", "Puma Sack")
    (changed / "styles.csv").write_text(styles)
    builder.prepare(source(changed), tmp_path / "other", progress=silently)
    builder.prepare(source(raw, seed=7), tmp_path / "split", progress=silently)
    others = [builder.metadata(tmp_path / name)["fingerprint"] for name in ("other", "split")]
    assert len({fingerprint, *others}) == 3


def test_the_key_of_a_source_changes_with_its_settings_and_its_files(raw):
    keys = {source(raw).key(), source(raw, test=9.0).key(), source(raw, seed=1).key(), source(raw.parent).key()}
    assert len(keys) == 4 and source(raw).key() in keys
    before = source(raw).key()
    (raw / "note.txt").write_text("new")
    after = source(raw).key()
    (raw / "note.txt").unlink()
    assert before != after


@pytest.mark.parametrize("where", ["checking", "writing test", "card"])
@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_preparation_leaves_no_dataset(raw, tmp_path, monkeypatch, where, existed):
    prepared = tmp_path / "p"
    if existed:
        prepared.mkdir()
        (prepared / "mine.txt").write_text("a file of the user")

    def progress(items, *, desc="", **_):
        yield next(iter(items))
        if desc.startswith(where):
            raise KeyboardInterrupt
        yield from list(items)[1:]

    if where == "card":
        monkeypatch.setattr(card, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises((KeyboardInterrupt, OSError)):
        builder.prepare(source(raw), prepared, progress=silently if where == "card" else progress)
    assert not builder.is_prepared(prepared)
    assert [path.name for path in prepared.rglob("*") if path.is_file()] == (["mine.txt"] if existed else [])


@pytest.mark.slow
def test_a_killed_preparation_is_incomplete_and_can_be_repeated(raw, tmp_path):
    code = f"""
import os
from pathlib import Path
from jaxclip.catalog import builder

def progress(items, *, desc="", **_):
    for number, item in enumerate(items):
        if desc == "writing test" and number == 3:
            os._exit(9)
        yield item

source = builder.Source("fashion_product_images", Path({str(raw)!r}), 8.0, 42, {{}})
builder.prepare(source, Path({str(tmp_path / "p")!r}), progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300)
    assert done.returncode == 9, done.stderr
    assert any((tmp_path / "p").rglob("*")) and not builder.is_prepared(tmp_path / "p")
    builder.prepare(source(raw), tmp_path / "p", progress=silently)
    assert len(Records(tmp_path / "p", "all")) == PRODUCTS - 3
    assert not list((tmp_path / "p").rglob("*incomplete*"))


def test_a_catalogue_without_a_readable_picture_is_an_error(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    (raw / "styles.csv").write_text("id,productDisplayName,articleType\n1,A bag,Bags\n2,A hat,Hats\n")
    with pytest.raises(UserError, match="no product has a readable image"):
        builder.prepare(source(raw, 1), tmp_path / "p", progress=silently)
    assert not (tmp_path / "p").exists()


def test_any_text_survives_preparation(tmp_path):
    names = ["Ünïcode 棉 🧥", 'quo"ted, name', "tab\tand  blanks", "null\x7fish"]
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption", "category", "colour"])
        for number, name in enumerate(names):
            Image.new("RGB", (20, 30), (40 * number, 10, 10)).save(tmp_path / f"{number}.png")
            table.writerow([f"ø{number}", f"{number}.png", name, "Röcke", f"grün-{number}"])
    builder.prepare(Source("table", tmp_path / "t.csv", 0, 0, {}), tmp_path / "p", progress=silently)
    products = {product.id: product for product, _ in Records(tmp_path / "p", "all").products()}
    assert list(products) and set(products) == {f"ø{number}" for number in range(len(names))}
    for number, name in enumerate(names):
        product = products[f"ø{number}"]
        assert product.captions == (" ".join(name.split()),)
        assert product.category == "Röcke" and product.attributes["colour"] == f"grün-{number}"
