"""Ids are the catalogue's own strings, and bytes that are not UTF-8 neither stop a reader nor merge products."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from jaxclip.catalog import ids, mend
from jaxclip.catalog.pictures import Picture, inspect
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS


def read(name, path, unit="article", **columns):
    """Returns (products in order with mended texts, (location, kind) of the oddities)."""
    items = list(mend.rows(READERS[name](Path(path), columns, unit)))
    products = [item for item in items if isinstance(item, Product)]
    return products, [(item.location, item.kind) for item in items if isinstance(item, Oddity)]


def drawn(colour):
    encoded = io.BytesIO()
    Image.new("RGB", (6, 8), colour).save(encoded, "PNG")
    return encoded.getvalue()


def put(path, content):
    path = os.fsencode(path) if isinstance(path, Path) else path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def colour(product):
    picture = inspect(*product.pictures)
    assert isinstance(picture, Picture)
    return Image.open(io.BytesIO(picture.encoded)).getpixel((0, 0))


def test_file_names_that_are_not_utf8_are_numbered_ids_of_their_own_pictures(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    for name, shade in ((b"a\xe8", "red"), (b"a\xe9", "blue"), (b"a", "lime")):
        put(folder + b"/" + name + b".png", drawn(shade))
        put(folder + b"/" + name + b".txt", f"a {shade} bag")
    put(folder + b"/rest\xff.dat", "")
    products, oddities = read("folder", tmp_path)
    unique = ids.unique([product.id for product in products])
    assert sorted(unique) == ["caf\ufffd/a", "caf\ufffd/a\ufffd", "caf\ufffd/a\ufffd-2"]
    for product in products:
        shade = product.captions[0].split()[1]
        assert colour(product) == Image.new("RGB", (1, 1), shade).getpixel((0, 0)), "each caption with its own picture"
        assert product.category == "caf\ufffd"
    kinds = [kind for _, kind in oddities]
    assert kinds.count("broken UTF-8") == 3 and ("caf\ufffd/rest\ufffd.dat", "not an image by its suffix") in oddities


def test_a_class_folder_that_is_not_utf8_is_a_caption_and_an_attribute_that_can_be_stored(tmp_path):
    put(os.fsencode(tmp_path) + b"/caf\xe9/1.png", drawn("red"))
    assert read("folder", tmp_path)[0][0].captions == ("caf\ufffd",)
    assert read("digikala", tmp_path)[0][0].attributes == {"baseColour": "caf\ufffd"}


def test_slashes_backslashes_zeros_case_and_spaces_of_ids_in_a_table_are_kept(tmp_path):
    written = ["a/b", "a\\b", "007", "7", "A/b", " a  b ", "1.0"]
    put(tmp_path / "t.csv", "\n".join(["id,image,text", *(f"{id_},{n}.png,bag {n}" for n, id_ in enumerate(written))]))
    products, oddities = read("table", tmp_path)
    assert [product.id for product in products] == written and oddities == []


def test_rows_with_one_id_and_other_images_are_other_products_with_that_id(tmp_path):
    rows = ["id,image,text,colour", "1,a.png,a bag,", "1,b.png,a hat,red", "1,a.png,a red bag,red", "2,a.png,a bag,"]
    put(tmp_path / "t.csv", "\n".join(rows))
    products, oddities = read("table", tmp_path)
    assert [(p.id, p.pictures[0].name, p.captions) for p in products] == [
        ("1", "a.png", ("a bag", "a red bag")),
        ("1", "b.png", ("a hat",)),
        ("2", "a.png", ("a bag",)),
    ]
    assert products[0].attributes == {"colour": "red"} and oddities == []
    assert ids.unique([product.id for product in products]) == ["1", "1-2", "2"]


def test_a_table_in_latin1_is_mended_and_finds_its_pictures(tmp_path):
    for name, shade in ((b"caf\xe9.png", "red"), (b"caf\xe8.png", "blue")):
        put(os.fsencode(tmp_path) + b"/" + name, drawn(shade))
    put(tmp_path / "t.csv", b"sku,image,text\nx\xe9,caf\xe9.png,a caf\xe9\nx\xe8,caf\xe8.png,tea\ny,caf\xe8.png,milk\n")
    for columns in ({}, {"product": "sku"}):
        products, oddities = read("table", tmp_path, **columns)
        assert [(product.id, product.captions) for product in products] == [
            ("x\ufffd", ("a caf\ufffd",)),
            ("x\ufffd", ("tea",)),
            ("y", ("milk",)),
        ]
        assert [colour(product) for product in products] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
        assert oddities == [("x\ufffd", "broken UTF-8")] * 2


def test_a_nul_in_a_table_is_mended_and_its_picture_is_missing(tmp_path):
    put(tmp_path / "1.png", drawn("red"))
    put(tmp_path / "t.csv", "id,image,text\n1,1.png,a bag\n2,1\0.png,a hat\n3\0,1.png,a \0shoe\n")
    (bag, hat, shoe), oddities = read("table", tmp_path)
    assert inspect(*hat.pictures) == "image missing" and (shoe.id, shoe.captions) == ("3\ufffd", ("a \ufffdshoe",))
    assert oddities == [("3\ufffd", "NUL character")] and colour(bag) == colour(shoe) == (255, 0, 0)


def test_lone_surrogates_and_other_bytes_in_json_are_replaced_in_every_text(tmp_path):
    photo = '{"id": 1, "file_name": "1\\udce9.png"}'
    annotations = '{"image_id": 1, "caption": "a \\ud800 cat"}, {"image_id": 1, "caption": "a \\ud83d\\ude00 cat"}'
    content = f'{{"images": [{photo}], "annotations": [{annotations}, {{"image_id": 1, "caption": "caf'.encode()
    put(tmp_path / "coco/annotations/captions_x.json", content + b'\xe9"}]}')
    put(os.fsencode(tmp_path) + b"/coco/images/1\xe9.png", drawn("red"))
    (product,), oddities = read("coco_captions", tmp_path / "coco")
    assert product.captions == ("a \ufffd cat", "a 😀 cat", "caf\ufffd") and product.id == "1\ufffd"
    assert colour(product) == (255, 0, 0) and oddities == [("1\ufffd", "broken UTF-8")]
    put(tmp_path / "meta_X.json.gz", gzip.compress(b'{"asin": "A1", "title": "caf\xe9 \\ud800", "brand": "\\udfff"}'))
    put(tmp_path / "images/A1.png", drawn("red"))
    (product,), _ = read("amazon_reviews", tmp_path)
    assert product.captions == ("caf\ufffd \ufffd",) and product.attributes == {"brand": "\ufffd"}


def test_caption_files_that_are_not_utf8_are_read(tmp_path):
    put(tmp_path / "flickr/results_20130124.token", b"caf\xe9.png#0\ta caf\xe9\nb.png#0\ta bag\n")
    put(os.fsencode(tmp_path) + b"/flickr/images/caf\xe9.png", drawn("red"))
    cafe, bag = read("flickr30k", tmp_path / "flickr")[0]
    assert (cafe.id, cafe.captions, colour(cafe)) == ("caf\ufffd", ("a caf\ufffd",), (255, 0, 0)) and bag.id == "b"
    put(tmp_path / "multi/captions.json", b'{"b.png": "caf\xe9"}')
    put(tmp_path / "multi/images/b.png", drawn("red"))
    assert read("deepfashion_multimodal", tmp_path / "multi")[0][0].captions == ("caf\ufffd",)
    descriptions = b'[{"item": "i1", "description": ["caf\xe9"]}]'
    put(tmp_path / "inshop/Anno/list_description_inshop.json", descriptions)
    put(
        tmp_path / "inshop/Eval/list_eval_partition.txt",
        b"2\nx\nimg/a/b/c/\xe9.png i1 train\nimg/a/b/c/\xe8.png i1 train",
    )
    for name in (b"\xe8", b"\xe9"):
        put(os.fsencode(tmp_path) + b"/inshop/img/a/b/c/" + name + b".png", drawn("red"))
    (article,), _ = read("deepfashion_inshop", tmp_path / "inshop")
    assert article.captions == ("caf\ufffd",) and len(article.pictures) == 2
    assert all(isinstance(inspect(image), Picture) for image in article.pictures)


def test_ids_in_the_json_of_a_webdataset_and_in_styles_csv_are_kept(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in (("a.png", drawn("red")), ("a.json", b'{"sku": " 0 \\ud800  1", "text": "caf\xe9"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (sample,), oddities = read("webdataset", tmp_path, id="sku")
    assert (sample.id, sample.captions, sample.attributes) == (" 0 \ufffd  1", ("caf\ufffd",), {})
    assert oddities == [(" 0 \ufffd  1", "broken UTF-8")]
    rows = ["id,productDisplayName", "007,a bag", " 7 ,a hat", "7,a shoe", "a  b,a belt"]
    put(tmp_path / "styles.csv", "\n".join(rows))
    put(tmp_path / "images/7.png", "")
    products, oddities = read("fashion_product_images", tmp_path)
    assert [(p.id, p.pictures[0].name) for p in products] == [
        ("007", "007.jpg"),
        (" 7 ", "7.jpg"),
        ("a  b", "a  b.jpg"),
    ]
    assert oddities == [("styles.csv:4", "duplicate id")]


def layouts(folder):
    """Writes a small catalogue of each layout with one photo per article."""
    for name in ("1", "2"):
        put(folder / "folder" / "red" / f"{name}.png", drawn("red"))
        put(folder / "fashion" / "images" / f"{name}.jpg", drawn("red"))
    put(folder / "table" / "t.csv", "id,image,text\n1,1.png,a bag\n1,2.png,a hat\n")
    put(folder / "fashion" / "styles.csv", "id,productDisplayName\n1,a bag\n2,a hat\n")
    karpathy = {"images": [{"filename": "1.jpg", "sentences": [{"raw": "a bag"}]}]}
    put(folder / "flickr" / "dataset_flickr30k.json", json.dumps(karpathy))
    put(folder / "flickr" / "images" / "1.jpg", drawn("red"))
    put(folder / "coco" / "dataset_coco.json", json.dumps(karpathy))
    return folder


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("folder", "folder"),
        ("digikala", "folder"),
        ("table", "table"),
        ("fashion_product_images", "fashion"),
        ("flickr30k", "flickr"),
        ("coco_captions", "coco"),
    ],
)
def test_the_unit_makes_no_difference_to_layouts_of_one_photo_per_article(tmp_path, name, path):
    catalogue = layouts(tmp_path) / path
    articles = list(READERS[name](catalogue, {}, "article"))
    assert articles == list(READERS[name](catalogue, {}, "photo"))
    assert articles and all(len(product.pictures) == 1 for product in articles)
