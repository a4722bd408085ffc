"""Readers of tables and folders yield every product and report every oddity."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS
from jaxclip.catalog.readers.folder import humanise
from jaxclip.errors import UserError


def read(name, path, unit="article", **columns):
    """Returns (products by id, oddities as (location, kind, dropped))."""
    items = list(READERS[name](Path(path), columns, unit))
    products = {item.id: item for item in items if isinstance(item, Product)}
    assert len(products) == sum(isinstance(item, Product) for item in items), "ids must be unique"
    return products, [(item.location, item.kind, item.dropped) for item in items if isinstance(item, Oddity)]


def test_a_table_of_any_columns_is_read(tmp_path):
    (tmp_path / "a.tsv").write_text("File Name\tTitle\tSKU\tClass\tbrand\nx/1.jpg\tA  bag\t9\tBags\tNA\n")
    products, oddities = read("table", tmp_path)
    assert oddities == []
    assert products["9"] == Product("9", (tmp_path / "x" / "1.jpg",), ("A bag",), "Bags", {"Class": "Bags"})


def test_rows_with_the_same_image_are_one_product_with_several_captions(tmp_path):
    rows = ["file_name,text", "1.jpg,a bag", '2.jpg,"a hat, blue"', "1.jpg,a red bag", "1.jpg,a bag"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    (tmp_path / "other.csv").write_text("")
    products, _ = read("table", tmp_path)
    assert {id_: product.captions for id_, product in products.items()} == {
        "1.jpg": ("a bag", "a red bag"),
        "2.jpg": ("a hat, blue",),
    }


def test_columns_can_be_configured_and_errors_name_the_flag(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("foto;Beschreibung\n1.jpg;Tasche, rot\n")
    with pytest.raises(UserError, match=r"columns are foto, Beschreibung; .*--config\.data\.columns\.image=NAME"):
        read("table", table)
    with pytest.raises(UserError, match="no column bild"):
        read("table", table, image="bild")
    with pytest.raises(UserError, match="is not a role"):
        read("table", table, picture="foto")
    products, _ = read("table", table, image="foto", caption="Beschreibung", id="")
    assert products["1.jpg"].captions == ("Tasche, rot",)


def test_a_table_without_captions_is_a_gallery(tmp_path):
    (tmp_path / "t.csv").write_text("image,colour,\n1.jpg,red,of an unnamed column\n2.jpg,,\n")
    products, oddities = read("table", tmp_path)
    assert [(p.captions, p.title, dict(p.attributes)) for p in products.values()] == [
        ((), "1.jpg", {"colour": "red"}),
        ((), "2.jpg", {}),
    ]
    assert oddities == [("t.csv", "no caption column (set it with data.columns.caption)", False)]


def test_odd_rows_of_a_table_are_reported(tmp_path):
    rows = (
        "id,image,caption,colour",
        "1,1.jpg,a bag,red",
        "2,,a hat,red",
        "3,3.jpg,NA,red",
        "4,4.jpg,a, comma,red",
        "5,https://x.org/5.jpg,a shoe,red",
        "6,6.jpg,short row",
        ",7.jpg,no id,red",
    )
    (tmp_path / "t.csv").write_text("\n".join(rows))
    products, oddities = read("table", tmp_path)
    assert list(products) == ["1", "6"]
    assert products["6"].attributes == {}
    assert oddities == [
        ("t.csv:3", "row without an image", True),
        ("t.csv:4", "row without a caption", True),
        ("t.csv:5", "row with too many fields", True),
        ("t.csv:6", "image is a URL, not a file", True),
        ("t.csv:8", "row without an id", True),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'image,text\n1.jpg,"never closed\n2.jpg,x\n', "t.csv:2"),
        (b"image,text\n", "no row"),
        (b"", "no row"),
        ("image,text\n1.jpg,x\n".encode("utf-16"), "not UTF-8"),
    ],
)
def test_an_unreadable_table_is_an_error(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("table", tmp_path)


def test_a_folder_must_have_exactly_one_table(tmp_path):
    with pytest.raises(UserError, match="none"):
        read("table", tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.csv").touch()
    with pytest.raises(UserError, match=r"a\.csv, b\.csv"):
        read("table", tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read("table", tmp_path / "c.csv")


def test_folders_are_categories_and_sidecars_are_captions(tmp_path):
    for name in ("top_view.jpg", "t-shirt/1.jpg", "women/long_sleeve/1.JPG", "women/long_sleeve/1.png", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "t-shirt" / "2.jpg").touch()
    (tmp_path / "t-shirt" / "2.txt").write_text("a red tee\n\n  a  tee \n")
    (tmp_path / "t-shirt" / "1.txt").write_text("\n")
    (tmp_path / "t-shirt" / "3.txt").write_text("lost")
    (tmp_path / "LICENSE").touch()
    products, oddities = read("folder", tmp_path)
    assert {id_: (product.category, product.captions) for id_, product in products.items()} == {
        "top_view": ("", ("top view",)),
        "t-shirt/1": ("t-shirt", ("t-shirt",)),
        "t-shirt/2": ("t-shirt", ("a red tee", "a tee")),
        "women/long_sleeve/1.JPG": ("women/long_sleeve", ("long sleeve",)),
        "women/long_sleeve/1.png": ("women/long_sleeve", ("long sleeve",)),
    }
    assert oddities == [
        ("LICENSE", "not an image by its suffix", True),
        ("t-shirt/1.txt", "empty caption file", False),
        ("t-shirt/3.txt", "caption without an image", True),
    ]


def test_linked_class_folders_are_followed_without_cycles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert list(read("folder", tmp_path / "data")[0]) == ["hat/1"]


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="has no image"):
        read("folder", tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        read("folder", tmp_path / "missing")


@given(st.text(min_size=1))
def test_a_humanised_name_is_never_empty(name):
    assert humanise(name)


@pytest.mark.skipif("JAXCLIP_REAL_DATA" not in os.environ, reason="JAXCLIP_REAL_DATA is not set")
def test_the_real_folder_of_classes_is_read():
    products, oddities = read("folder", Path(os.environ["JAXCLIP_REAL_DATA"]) / "clothing-dataset-small" / "test")
    assert (len(products), oddities) == (372, [])
    assert {product.captions for product in products.values()} >= {("t-shirt",), ("dress",)}
