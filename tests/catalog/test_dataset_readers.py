"""Readers of published fashion datasets, each on a small fixture in the dataset's format."""

import gzip
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import groups
from jaxclip.catalog.pictures import Picture, inspect
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS
from jaxclip.errors import UserError


def read(name, path, unit="article", **columns):
    """Returns (products by id, oddities as (location, kind, dropped))."""
    items = list(READERS[name](path, columns, unit))
    products = {item.id: item for item in items if isinstance(item, Product)}
    assert len(products) == sum(isinstance(item, Product) for item in items), "ids must be unique"
    return products, [(item.location, item.kind, item.dropped) for item in items if isinstance(item, Oddity)]


def picture(colour="red", size=(6, 8), form="JPEG"):
    encoded = io.BytesIO()
    Image.new("RGB", size, colour).save(encoded, form)
    return encoded.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def is_picture(product):
    """Returns whether all pictures can be decoded; checks the declared size of a picture inside another file."""
    for image in product.pictures:
        if not isinstance(image, Path):
            assert 0 < image.size <= len(image.read()) + 200
    return bool(product.pictures) and all(isinstance(inspect(image), Picture) for image in product.pictures)


def test_deepfashion_multimodal_photos_as_products_of_one_article_are_one_group(tmp_path):
    names = [f"WOMEN-Blouses_Shirts-id_00000002-02_{view}.jpg" for view in ("1_front", "2_side")]
    for name in [*names, "MEN-Denim-id_00000080-01_7_additional.jpg"]:
        put(tmp_path / "images" / name, picture())
    captions = {names[0]: "The shirt this woman wears has short sleeves.", names[1]: "A  cotton shirt.", "odd.jpg": ""}
    captions["MEN-Denim-id_00000080-01_7_additional.jpg"] = "His trousers are denim."
    put(tmp_path / "captions.json", json.dumps(captions))
    put(tmp_path / "labels/shape/shape_anno_all.txt", f"{names[0]} 1 4 0 1 4 0 0 0 4 5 1 0\n{names[1]} 1 4\n")
    put(tmp_path / "labels/texture/fabric_ann.txt", f"{names[0]} 1 7 0\n")
    products, oddities = read("deepfashion_multimodal", tmp_path, "photo")
    front = products["WOMEN-Blouses_Shirts-id_00000002-02_1_front"]
    assert front.captions == ("The shirt this woman wears has short sleeves.",)
    assert (front.category, front.group) == ("Blouses Shirts", "WOMEN-Blouses_Shirts-id_00000002")
    assert front.attributes["sleeveLength"] == "short-sleeve" and front.attributes["hat"] == "yes"
    assert front.attributes["upperFabric"] == "cotton" and front.attributes["outerFabric"] == "denim"
    assert "lowerFabric" not in front.attributes and "lowerLength" not in front.attributes, "not visible"
    assert oddities == [
        ("shape_anno_all.txt:2", "row without 12 numbers", False),
        ("captions.json: odd.jpg", "photo without a caption", True),
    ]
    assert all(map(is_picture, products.values()))
    assigned = groups.assign(list(products.values()), list(products), [["a"], ["b"], ["c"]]).names
    assert assigned[0] == assigned[1] != assigned[2]


@pytest.mark.parametrize(
    ("rows", "meaning"), [([5], "lapel"), ([4], "standing"), ([4, 3], "lapel"), ([7], None), ([6, 3], None)]
)
def test_deepfashion_multimodal_necklines_are_numbered_with_or_without_the_documented_gap(tmp_path, rows, meaning):
    for number in range(len(rows)):
        put(tmp_path / "images" / f"MEN-Denim-id_{number}-01_1_front.jpg", picture())
    names = sorted(file.name for file in (tmp_path / "images").iterdir())
    put(tmp_path / "captions.json", json.dumps(dict.fromkeys(names, "denim")))
    lines = [f"{name} 5 4 3 2 4 2 2 2 4 {row} 2 2" for name, row in zip(names, rows, strict=True)]
    put(tmp_path / "labels/shape/shape_anno_all.txt", "\n".join(lines))
    products, _ = read("deepfashion_multimodal", tmp_path, "photo")
    assert products[names[0].removesuffix(".jpg")].attributes.get("neckline") == meaning


def test_deepfashion_inshop_photos_as_products_have_a_view_and_a_partition(tmp_path):
    entries = [
        {"item": "id_00000001", "color": "Purple", "description": ["A knit top.", " ", "100%  cotton"]},
        {"item": "id_00000001", "color": "Blue", "description": ["A knit top.", "100% cotton"]},
        {"item": "id_00000003", "color": "Red"},
    ]
    put(tmp_path / "Anno/list_description_inshop.json", json.dumps(entries))
    rows = ["4", "image_name item_id evaluation_status"]
    rows += [
        f"img/WOMEN/Tees_Tanks/id_00000001/0{n}_1_front.jpg id_00000001 {p}" for n, p in ((1, "query"), (2, "train"))
    ]
    rows += ["img/MEN/Denim/id_00000003/01_1_front.jpg id_00000003 train", "img/MEN/x.jpg"]
    put(tmp_path / "Eval/list_eval_partition.txt", "\n".join(rows))
    for n in (1, 2):
        put(tmp_path / f"Img/img/WOMEN/Tees_Tanks/id_00000001/0{n}_1_front.jpg", picture())
    products, oddities = read("deepfashion_inshop", tmp_path, "photo")
    first = products["WOMEN/Tees_Tanks/id_00000001/01_1_front"]
    assert first.captions == ("A knit top. 100% cotton",) and first.group == "id_00000001"
    assert (first.category, first.attributes["partition"]) == ("Tees Tanks", "query")
    assert first.attributes["colours"] == "Purple, Blue" and first.attributes["view"] == "front"
    assert len(products) == 2 and all(map(is_picture, products.values()))
    assert [kind for _, kind, _ in oddities] == [
        "article without a description",
        "row is not a photo, an article and a partition",
    ]


def fashion_gen(path, count, **more):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["input_image"] = rng.integers(0, 255, (count, 8, 6, 3), dtype=np.uint8)
        texts = [[f"Jupe plissée {n}<br>in noir".encode("latin-1")] for n in range(count)]
        file["input_description"] = np.array(texts, dtype="S60")
        file["input_category"] = np.array([[b"SKIRTS"]] * count)
        file["input_productID"] = np.arange(count)[:, None] // 2
        for name, values in more.items():
            file[name] = values
    return rng


def test_fashion_gen_rows_are_read_one_at_a_time(tmp_path):
    fashion_gen(tmp_path / "fashiongen_256_256_train.h5", 5, input_gender=np.array([[b"Women"]] * 5))
    fashion_gen(tmp_path / "fashiongen_256_256_validation.h5", 2)
    products, oddities = read("fashion_gen", tmp_path, "photo")
    assert oddities == [] and len(products) == 7
    product = products["train-3"]
    assert product.captions == ("Jupe plissée 3 in noir",) and product.category == "SKIRTS"
    assert product.attributes == {"gender": "Women", "partition": "train"}
    assert product.group == products["train-2"].group != products["train-4"].group
    with (
        h5py.File(tmp_path / "fashiongen_256_256_train.h5") as file,
        Image.open(io.BytesIO(product.pictures[0].read())) as decoded,
    ):
        np.testing.assert_array_equal(np.asarray(decoded), file["input_image"][3])
    assert is_picture(product) and "input_image[3]" in str(product.pictures[0])


def test_a_fashion_gen_file_that_is_truncated_or_lacks_a_dataset_is_named(tmp_path):
    file = tmp_path / "fashiongen_256_256_train.h5"
    fashion_gen(file, 3)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is not an HDF5 file or is truncated"):
        read("fashion_gen", file)
    with h5py.File(file, "w") as empty:
        empty["input_image"] = np.zeros((1, 2, 2, 3), np.uint8)
    with pytest.raises(UserError, match="has no dataset input_description: it has input_image"):
        read("fashion_gen", file)


def test_amazon_photos_are_found_by_url_or_asin_and_ratings_are_counted(tmp_path):
    entries = [
        {"asin": "A1", "title": "Wool &amp; silk <b>scarf</b>", "category": ["Clothing", "Women", "Scarves", "soft!"]},
        {"asin": "A2", "title": "Belt", "imageURLHighRes": ["https://x/no.jpg", "https://x/I/41%2Babc.jpg?w=1"]},
        {"asin": "A3", "title": "No photo", "brand": "Acme"},
        {"asin": "A4"},
        {"asin": "A1", "title": "again"},
        {"asin": "A5", "title": "x" * 2000},
        {"title": "nameless"},
    ]
    lines = [json.dumps(entry) for entry in entries] + ["{broken"]
    put(tmp_path / "meta_AMAZON_FASHION.json.gz", gzip.compress("\n".join(lines).encode()))
    reviews = [{"asin": "A1", "overall": 5.0}, {"asin": "A1", "overall": 2}, {"asin": "A2", "reviewText": "?"}]
    put(tmp_path / "AMAZON_FASHION.json.gz", gzip.compress("\n".join(map(json.dumps, reviews)).encode()))
    put(tmp_path / "images/A1.jpg", picture())
    put(tmp_path / "images/41+abc.jpg", picture("blue"))
    products, oddities = read("amazon_reviews", tmp_path)
    assert products["A1"].captions == ("Wool & silk scarf",) and products["A1"].category == "Scarves"
    assert products["A1"].attributes == {"reviews": "2", "rating": "3.50"}
    assert products["A2"].pictures[0].name == "41+abc.jpg" and is_picture(products["A1"])
    assert inspect(*products["A3"].pictures) == "image missing" and products["A3"].attributes == {"brand": "Acme"}
    assert [kind for _, kind, _ in oddities] == [
        "product without a title",
        "duplicate ASIN",
        "title too long to be a name",
        "product without an ASIN",
        "line is not a JSON object",
    ]


def test_truncated_amazon_metadata_yields_the_products_before_the_truncation(tmp_path):
    (tmp_path / "images").mkdir()
    lines = "\n".join(
        json.dumps({"asin": f"A{n}", "title": f"hat {n} {np.random.default_rng(n).bytes(20).hex()}"})
        for n in range(2000)
    )
    whole = gzip.compress(lines.encode())
    put(tmp_path / "meta_X.json.gz", whole[: len(whole) // 2])
    products, oddities = read("amazon_reviews", tmp_path)
    assert 100 < len(products) < 2000
    assert oddities[-1][1] == "file is truncated or damaged from here on"


def test_digikala_is_a_gallery_without_captions_whose_colours_are_attributes(tmp_path):
    for name in ("red/1.jpg", "navy_blue/1.jpg", "navy_blue/2.jpg"):
        put(tmp_path / name, picture())
    products, _ = read("digikala", tmp_path)
    assert {p.attributes["baseColour"] for p in products.values()} == {"red", "navy blue"}
    assert all(p.captions == () and p.category == "" for p in products.values())
    assert len(set(groups.assign(list(products.values()), list(products), [["a"], ["b"], ["c"]]).names)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("amazon_reviews", "lacks images/.*https://nijianmo.github.io/amazon"),
        ("coco_captions", "lacks annotations/captions_.*https://cocodataset.org"),
        ("deepfashion_inshop", "lacks Anno/list_description_inshop.json, Eval/list_eval_partition.txt.*mmlab"),
        ("deepfashion_multimodal", "lacks captions.json, images/.*github.com/yumingj"),
        ("fashion_gen", "has no .h5 file.*fashion-gen.com"),
        ("flickr30k", "lacks the photos.*DenotationGraph"),
        ("webdataset", "has no .tar file"),
        ("tfds", "lacks dataset_info.json"),
    ],
)
def test_an_error_for_an_empty_folder_says_where_to_fetch_the_dataset_and_where_to_put_it(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        read(name, tmp_path)
