"""Fashion Product Images: every row becomes a product, and every oddity is reported."""

import csv
import io
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS, fashion_product_images
from jaxclip.catalog.readers.fashion_product_images import split_row
from jaxclip.errors import UserError

COLUMNS = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName"
SHIRT = "1,Men,Apparel,Topwear,Shirts,Blue,Fall,2011,Casual,Turtle Check Shirt"


def read_styles(path, **columns):
    """Returns (products by id, oddities as (location, kind, dropped))."""
    items = list(fashion_product_images.read(Path(path), columns))
    products = {item.id: item for item in items if isinstance(item, Product)}
    assert len(products) == sum(isinstance(item, Product) for item in items), "ids must be unique"
    return products, [(item.location, item.kind, item.dropped) for item in items if isinstance(item, Oddity)]


def styles(folder, *rows, header=COLUMNS, encoding="utf-8"):
    (folder / "images").mkdir(exist_ok=True)
    (folder / "styles.csv").write_bytes("\n".join([header, *rows, ""]).encode(encoding))
    return folder


def test_the_drawn_catalogue_has_the_same_reader():
    assert READERS["drawn"] is READERS["fashion_product_images"] is fashion_product_images.read


def test_a_row_becomes_a_product_with_the_datasets_attribute_names(tmp_path):
    products, oddities = read_styles(styles(tmp_path, SHIRT))
    assert oddities == []
    assert products["1"] == Product(
        id="1",
        pictures=(tmp_path / "images" / "1.jpg",),
        captions=("Turtle Check Shirt",),
        category="Topwear",
        attributes={
            "gender": "Men",
            "masterCategory": "Apparel",
            "subCategory": "Topwear",
            "articleType": "Shirts",
            "baseColour": "Blue",
            "season": "Fall",
            "year": "2011",
            "usage": "Casual",
        },
    )


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("Perfume, After Shave, and Gel", "Perfume, After Shave, and Gel"),
        ('Tempo 3.5" Short', 'Tempo 3.5" Short'),
        ('Tempo 3.5", Pink', 'Tempo 3.5", Pink'),
        ('"Perfume, After Shave"', "Perfume, After Shave"),
        ('"Tempo 3.5"" Short"', 'Tempo 3.5" Short'),
        ('"Cool" Tee', '"Cool" Tee'),
        ('"Cool" Tee, Blue', '"Cool" Tee, Blue'),
        ("  Puma   Shoe ", "Puma Shoe"),
    ],
)
def test_names_keep_commas_and_inch_marks_quoted_or_not(tmp_path, written, name):
    products, oddities = read_styles(styles(tmp_path, SHIRT.replace("Turtle Check Shirt", written)))
    assert (products["1"].captions, oddities) == ((name,), [])


def test_columns_are_found_by_name_and_surplus_commas_belong_to_the_name(tmp_path):
    folder = styles(tmp_path, "Gel, Blue, new,7,images/7.jpg", header="productDisplayName,id,file")
    products, _ = read_styles(folder)
    assert products["7"].captions == ("Gel, Blue, new",)
    assert products["7"].attributes == {"file": "images/7.jpg"}


def test_missing_values_are_absent_and_a_missing_name_is_built(tmp_path):
    rows = (
        "1,Women,Accessories,Bags,Clutches,Maroon,,2012,NA,NA",
        "2,Women,Accessories,Bags,NA,Maroon,,2012,NA,NA",
        "3,Men,Apparel",
        "1,Men,Apparel,Topwear,Shirts,Blue,Fall,2011,Casual,Again",
        ",Men,Apparel,Topwear,Shirts,Blue,Fall,2011,Casual,No id",
    )
    products, oddities = read_styles(styles(tmp_path, *rows))
    assert list(products) == ["1"]
    assert products["1"].captions == ("Women Maroon Clutches",)
    assert not {"season", "usage", "productDisplayName", "id"} & set(products["1"].attributes)
    assert oddities == [
        ("styles.csv:2", "no name, built from attributes", False),
        ("styles.csv:3", "no name and no article type", True),
        ("styles.csv:4", "row with too few fields", True),
        ("styles.csv:5", "duplicate id", True),
        ("styles.csv:6", "row without an id", True),
    ]


def test_a_byte_order_mark_and_invalid_bytes_are_accepted(tmp_path):
    styles(tmp_path, SHIRT, encoding="utf-8-sig")
    assert read_styles(tmp_path)[1] == []
    styles(tmp_path, SHIRT.replace("Turtle", "Café"), encoding="latin-1")
    products, oddities = read_styles(tmp_path)
    assert products["1"].captions == ("Caf\ufffd Check Shirt",)
    assert oddities == [("styles.csv:2", "broken UTF-8", False)]


def test_the_full_layout_adds_pattern_and_material_and_fills_gaps(tmp_path):
    others = [SHIRT.replace("1,", f"{id_},", 1) for id_ in (2, 3)]
    nameless = "4,Men,Apparel,Topwear,Shirts,Blue,Fall,2011,Casual,NA"
    styles(tmp_path, SHIRT.replace("Fall", ""), *others, nameless)
    (tmp_path / "styles").mkdir()
    data = {
        "season": "Winter",
        "year": "1999",
        "subCategory": {"typeName": "Topwear"},
        "articleAttributes": {"Pattern": "NA", "Print or Pattern Type": "Checked", "Fabric": "Cotton "},
    }
    (tmp_path / "styles" / "1.json").write_text(json.dumps({"data": data}))
    (tmp_path / "styles" / "2.json").write_text('{"data": {"articleAttr')
    (tmp_path / "styles" / "4.json").write_text('{"data": {"productDisplayName": "Turtle", "articleAttributes": []}}')
    products, oddities = read_styles(tmp_path)
    first = products["1"].attributes
    assert (first["pattern"], first["materialType"], first["season"]) == ("Checked", "Cotton", "Winter")
    assert first["year"] == "2011", "the value in the table takes precedence"
    assert products["2"].attributes == products["3"].attributes
    assert not {"pattern", "materialType"} & products["2"].attributes.keys()
    assert products["4"].captions == ("Turtle",)
    assert oddities == [
        ("styles/2.json", "broken JSON file", False),
        ("styles/3.json", "JSON file missing", False),
        ("styles.csv:5", "no name, taken from its JSON file", False),
    ]


BROKEN = ["[]", "3", '{"data": 3}', '{"data": {"masterCategory": "x"}}', "\xff", "[" * 100_000]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_json_file_does_not_drop_the_product(tmp_path, broken):
    styles(tmp_path, SHIRT)
    (tmp_path / "styles").mkdir()
    (tmp_path / "styles" / "1.json").write_bytes(broken.encode("latin-1"))
    products, oddities = read_styles(tmp_path)
    assert list(products) == ["1"]
    assert oddities == [("styles/1.json", "broken JSON file", False)]


def test_an_error_for_a_wrong_folder_says_what_is_missing(tmp_path):
    def error_message(**columns):
        with pytest.raises(UserError) as error:
            read_styles(tmp_path / "catalogue", **columns)
        return str(error.value)

    assert "is not a folder" in error_message()
    (tmp_path / "catalogue").mkdir()
    assert "no styles.csv" in error_message()
    (tmp_path / "catalogue" / "styles.csv").write_text("id,name\n")
    assert "images/" in error_message()
    (tmp_path / "catalogue" / "images.tar.gz").touch()
    assert "unpack images.tar.gz" in error_message()
    (tmp_path / "catalogue" / "images").mkdir()
    assert "no column productDisplayName: its columns are id, name" in error_message()
    assert "columns" in error_message(caption="name")
    with pytest.raises(UserError, match=f"did you mean {tmp_path / 'catalogue'}"):
        read_styles(tmp_path)


TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\n\x00"), max_size=20)


@given(st.lists(TEXT, min_size=10, max_size=10))
def test_a_row_quoted_by_a_csv_writer_is_read_unchanged(fields):
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(fields)
    assert split_row(line.getvalue(), 10, 9) == fields


@given(st.lists(st.text("ab ", max_size=5), min_size=9, max_size=9), st.text("ab,\"' ", max_size=20))
def test_an_unquoted_row_keeps_its_name(fields, name):
    split = split_row(",".join([*fields, name]), 10, 9)
    assert split[:9] == fields
    assert split[9] == name or name.startswith('"')


REAL = os.environ.get("JAXCLIP_REAL_DATA")
real_data = pytest.mark.skipif(not REAL, reason="JAXCLIP_REAL_DATA is not set")


@real_data
def test_the_real_catalogue_is_read_with_its_known_oddities():
    products, oddities = read_styles(Path(REAL) / "fashion-products")
    assert len(products) == 6000
    assert all(product.pictures[0].is_file() for product in products.values())
    assert Counter(kind for _, kind, _ in oddities) == {"no name, built from attributes": 7}
    lines = (Path(REAL) / "fashion-products" / "styles.csv").read_text().splitlines()
    nameless = {lines[int(location.removeprefix("styles.csv:")) - 1].split(",")[0] for location, _, _ in oddities}
    assert nameless == {"42878", "30991", "45687", "42863", "45698", "30992", "43119"}
    assert products["42878"].captions == ("Women Maroon Clutches",)
    with_commas = {id_ for id_, product in products.items() if "," in product.captions[0]}
    assert len(with_commas) == 18
    assert {"44065", "3413", "59768", "23127"} <= with_commas
    assert products["3413"].captions == ("Myntra Men's Yes, its all about me White T-shirt",)
    assert {id_ for id_, product in products.items() if '"' in product.captions[0]} == {"7491", "7497"}
    assert products["7491"].captions == ("Nike Women's EM Tempo 3.5\" Pink Short",)
    absent = Counter()
    for product in products.values():
        assert all(value not in ("", "NA") for value in product.attributes.values())
        absent.update({"season", "year", "usage", "baseColour"} - product.attributes.keys())
    assert absent == {"season": 15, "usage": 32, "baseColour": 6}
    assert Counter(product.category for product in products.values()).most_common(3) == [
        ("Topwear", 1819),
        ("Shoes", 1120),
        ("Bottomwear", 471),
    ]


@real_data
def test_the_whole_small_catalogue_is_read(tmp_path):
    (tmp_path / "styles.csv").symlink_to(Path(REAL) / "fashion-products-small" / "styles.csv")
    (tmp_path / "images").mkdir()
    products, oddities = read_styles(tmp_path)
    assert len(products) == 41446
    assert oddities == []
    assert {id_ for id_, product in products.items() if '"' in product.captions[0]} == {"7491", "7497"}
    master = Counter(product.attributes["masterCategory"] for product in products.values())
    assert (master["Apparel"], master["Accessories"], master["Home"]) == (20259, 10416, 1)
