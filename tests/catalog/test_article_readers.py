"""Articles with several photos are one product, or with unit "photo" one product for each photo."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxclip.catalog.pictures import Picture, inspect
from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import READERS, layout
from jaxclip.catalog.readers import fashion_gen as fashion_gen_reader
from jaxclip.errors import UserError
from tests.catalog.test_format_readers import shard


def read(name, path, unit="article", **columns):
    """Returns (products in order, kinds of the oddities)."""
    items = list(READERS[name](Path(path), columns, unit))
    products = [item for item in items if isinstance(item, Product)]
    return products, [item.kind for item in items if isinstance(item, Oddity)]


def drawn(colour):
    encoded = io.BytesIO()
    Image.new("RGB", (6, 8), colour).save(encoded, "JPEG")
    return encoded.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def names(product):
    return [image.name for image in product.pictures]


def are_pictures(product):
    return all(isinstance(inspect(image), Picture) for image in product.pictures)


def inshop(folder):
    entries = [
        {"item": "id_00000001", "color": "Purple", "description": ["A knit top."]},
        {"item": "id_00000001", "color": "Blue", "description": ["A ribbed top."]},
        {"item": "id_00000002", "color": "Red", "description": ["A red dress."]},
    ]
    put(folder / "Anno/list_description_inshop.json", json.dumps(entries))
    photos = [
        ("WOMEN/Tees_Tanks/id_00000001/01_1_front.jpg", "id_00000001", "gallery"),
        ("WOMEN/Dresses/id_00000002/01_1_front.jpg", "id_00000002", "train"),
        ("WOMEN/Tees_Tanks/id_00000001/01_2_side.jpg", "id_00000001", "query"),
        ("WOMEN/Tees_Tanks/id_00000001/01_1_front.jpg", "id_00000001", "gallery"),
    ]
    rows = [
        "4",
        "image_name item_id evaluation_status",
        *(f"img/{photo} {item} {part}" for photo, item, part in photos),
    ]
    put(folder / "Eval/list_eval_partition.txt", "\n".join(rows))
    for photo, _, _ in photos:
        put(folder / "img" / photo, drawn("red"))


def test_an_inshop_article_is_one_product_whose_photos_have_the_benchmarks_roles(tmp_path):
    inshop(tmp_path)
    top, dress = read("deepfashion_inshop", tmp_path)[0]
    assert (top.id, names(top), top.roles) == (
        "id_00000001",
        ["01_1_front.jpg", "01_2_side.jpg"],
        ("gallery", "query"),
    )
    assert top.captions == ("A knit top.", "A ribbed top.") and top.category == "Tees Tanks" and top.group == ""
    assert top.attributes == {"partition": "test", "gender": "WOMEN", "colours": "Purple, Blue"}
    assert (dress.id, dress.roles, dress.attributes["partition"]) == ("id_00000002", (), "train")
    assert are_pictures(top) and are_pictures(dress)


def test_inshop_photos_as_products_keep_their_roles_and_the_group_of_their_article(tmp_path):
    inshop(tmp_path)
    photos, _ = read("deepfashion_inshop", tmp_path, "photo")
    assert [photo.id.rpartition("/")[2] for photo in photos] == ["01_1_front", "01_1_front", "01_2_side", "01_1_front"]
    assert [photo.roles for photo in photos] == [("gallery",), (), ("query",), ("gallery",)]
    assert [photo.group for photo in photos] == ["id_00000001", "id_00000002", "id_00000001", "id_00000001"]
    assert photos[2].attributes["view"] == "side" and photos[2].attributes["partition"] == "query"


def test_a_multimodal_article_has_the_captions_of_all_its_photos_once(tmp_path):
    shirt, hat = "WOMEN-Shirts-id_00000002", "MEN-Hats-id_00000001"
    captions = {
        f"{shirt}-02_1_front.jpg": "A shirt.",
        f"{hat}-01_1_front.jpg": "",
        f"{shirt}-02_2_side.jpg": "A shirt.",
        f"{shirt}-02_3_back.jpg": " ",
        f"{shirt}-02_4_full.jpg": "A cotton shirt.",
        "plain.jpg": "A bag.",
        "silent.jpg": "",
    }
    put(tmp_path / "captions.json", json.dumps(captions))
    for name in captions:
        put(tmp_path / "images" / name, drawn("red"))
    fabrics = f"{shirt}-02_1_front.jpg 0 7 7\n{shirt}-02_2_side.jpg 1 1 7\n"
    put(tmp_path / "labels/texture/fabric_ann.txt", fabrics)
    products, oddities = read("deepfashion_multimodal", tmp_path)
    plain, article = products
    assert (plain.id, plain.captions) == ("plain", ("A bag.",))
    assert (article.id, len(article.pictures), article.captions) == (shirt, 4, ("A shirt.", "A cotton shirt."))
    assert article.attributes == {"gender": "WOMEN", "upperFabric": "denim", "lowerFabric": "cotton"}
    assert oddities == [
        "file name without article and category",
        "photo without a caption",
        "article without a caption",
    ]
    photos, oddities = read("deepfashion_multimodal", tmp_path, "photo")
    assert [photo.group for photo in photos] == [shirt] * 3 + [""] and oddities.count("photo without a caption") == 3


def fashion_gen(file, articles, texts, colours):
    pixels = [np.full((4, 4, 3), colour, np.uint8) for colour in colours]
    with h5py.File(file, "w") as opened:
        opened["input_image"] = np.stack(pixels)
        opened["input_description"] = np.array([[text.encode("latin-1")] for text in texts], dtype="S20")
        opened["input_productID"] = np.array([[article] for article in articles])
        opened["input_pose"] = np.array([[f"id_gridfs_{n}".encode()] for n in range(len(texts))])


def test_rows_of_a_fashion_gen_product_need_not_be_adjacent_nor_in_one_file(tmp_path):
    fashion_gen(tmp_path / "f_train.h5", [7, 8, 7, 9], ["a skirt", "a hat", "", "a bag"], [10, 20, 30, 40])
    fashion_gen(tmp_path / "f_validation.h5", [9, 3, 9], ["a blue bag", "", "a bag"], [50, 60, 70])
    products, oddities = read("fashion_gen", tmp_path)
    assert [(product.id, product.captions) for product in products] == [
        ("8", ("a hat",)),
        ("7", ("a skirt",)),
        ("9", ("a bag", "a blue bag")),
    ]
    bag = products[2]
    pixels = [np.asarray(Image.open(io.BytesIO(image.read())))[0, 0, 0] for image in bag.pictures]
    assert pixels == [40, 50, 70] and are_pictures(bag)
    assert bag.attributes == {"partition": "train"}, "a pose is a photo's"
    assert oddities == ["article without a caption"]


def test_a_fashion_gen_product_is_yielded_after_its_last_row(tmp_path, monkeypatch):
    count, parsed = 400, []
    fashion_gen(tmp_path / "f_train.h5", np.arange(count) // 4, ["a hat"] * count, np.zeros(count))
    original = fashion_gen_reader._text
    monkeypatch.setattr(fashion_gen_reader, "_text", lambda value: parsed.append(value) or original(value))
    rows = READERS["fashion_gen"](tmp_path, {}, "article")
    assert len(next(rows).pictures) == 4
    assert len(parsed) < count, "few rows are in memory"
    assert sum(len(product.pictures) for product in rows) == count - 4


@pytest.mark.parametrize("unit", ["article", "photo"])
def test_fashion_gen_ids_are_kept_as_written_and_rows_without_one_are_products(tmp_path, unit):
    fashion_gen(tmp_path / "f_train.h5", [b"007", b"", b"a <br> b", b"007"], ["a", "b", "c", "d"], [1, 2, 3, 4])
    products, _ = read("fashion_gen", tmp_path, unit)
    if unit == "article":
        assert [product.id for product in products] == ["train-1", "a <br> b", "007"]
    else:
        assert [product.id for product in products] == ["train-0", "train-1", "train-2", "train-3"]
        assert [product.group for product in products] == ["article-007", "", "article-a <br> b", "article-007"]
        assert products[0].attributes["view"] == "id_gridfs_0"


PHOTO = st.tuples(st.sampled_from(["", "a", "b", "c"]), st.integers(0, 4), st.sampled_from(["", "x", "y"]))


@given(st.lists(PHOTO, max_size=12))
def test_articles_have_the_same_photos_and_captions_in_any_order_of_yielding(rows):
    photos = [
        Product(f"photo-{n}", (Path(str(number)),), (caption,) if caption else (), group=group)
        for n, (group, number, caption) in enumerate(rows)
    ]
    expected = {
        group: ({str(n) for g, n, _ in rows if g == group}, {c for g, _, c in rows if g == group and c})
        for group in {group for group, _, _ in rows if group}
    }
    at_the_end = list(layout.articles(photos))
    early = list(layout.articles(photos, Counter(group for group, _, _ in rows)))
    assert sorted(early, key=repr) == sorted(at_the_end, key=repr)
    merged = {p.id: (names(p), p.captions) for p in early if isinstance(p, Product) and p.id in expected}
    assert merged.keys() == {group for group, (_, captions) in expected.items() if captions}
    for group, (pictures, captions) in merged.items():
        assert (set(pictures), set(captions)) == expected[group]
        assert len(pictures) == len(set(pictures)) and len(captions) == len(set(captions))
    assert [p for p in photos if not p.group] == [p for p in early if isinstance(p, Product) and p.id not in expected]


def test_an_amazon_product_has_the_photos_of_all_its_urls_once(tmp_path):
    high = ["https://x/I/41a.jpg", "https://x/I/41b.jpg", "https://x/I/lost.jpg"]
    low = ["https://x/I/41a._US40_.jpg", "https://x/I/41b._US40_.jpg", "https://x/I/41c._US40_.jpg"]
    entries = [
        {"asin": "A1", "title": "Scarf", "imageURLHighRes": high, "imageURL": low},
        {"asin": "A2", "title": "Belt"},
        {"asin": "A3", "title": "Hat", "imageURL": "https://x/I/lost.jpg"},
    ]
    put(tmp_path / "meta_X.json.gz", gzip.compress("\n".join(map(json.dumps, entries)).encode()))
    files = ["41b.jpg", "41a.jpg", "41a._US40_.jpg", "41c._US40_.jpg", "A1.jpg", "A2_10.jpg", "A2-2.jpg", "A2.jpg"]
    for name in files:
        put(tmp_path / "images" / name, drawn("red"))
    scarf, belt, hat = read("amazon_reviews", tmp_path)[0]
    assert names(scarf) == ["41a.jpg", "41b.jpg", "41c._US40_.jpg"]
    assert names(belt) == ["A2.jpg", "A2-2.jpg", "A2_10.jpg"]
    assert names(hat) == ["A3.jpg"] and inspect(*hat.pictures) == "image missing"
    photos, _ = read("amazon_reviews", tmp_path, "photo")
    assert list(map(names, photos)) == [["41a.jpg"], ["A2.jpg"], ["A3.jpg"]]


def test_rows_with_the_same_product_column_are_one_product(tmp_path):
    rows = (
        "photo_id,image,title,Artikel,colour,size",
        "1,1.jpg,a bag,007 ,red,",
        "2,2.jpg,a hat,08,blue,",
        "3,3.jpg,,007 ,green,L",
        "4,4.jpg,a red bag,007 ,,",
        "5,1.jpg,a bag,007 ,,",
        "6,6.jpg,a shoe,,,",
        "7,7.jpg,,09,,",
    )
    put(tmp_path / "t.csv", "\n".join(rows))
    columns = {"product": "Artikel", "id": "photo_id"}
    (bag, hat), oddities = read("table", tmp_path, **columns)
    assert (bag.id, names(bag)) == ("007 ", ["1.jpg", "3.jpg", "4.jpg"])
    assert bag.captions == ("a bag", "a red bag") and bag.attributes == {"colour": "red", "size": "L"}
    assert (hat.id, names(hat), hat.group) == ("08", ["2.jpg"], "")
    assert oddities == ["row without a product", "product without a caption"]
    photos, oddities = read("table", tmp_path, "photo", **columns)
    assert [(photo.id, names(photo), photo.group) for photo in photos] == [
        ("1", ["1.jpg"], "007"),
        ("2", ["2.jpg"], "08"),
        ("4", ["4.jpg"], "007"),
        ("5", ["1.jpg"], "007"),
        ("6", ["6.jpg"], ""),
    ]
    assert oddities == ["row without a caption"] * 2
    with pytest.raises(UserError, match=r"no column sku \(--config\.data\.columns\.product\)"):
        read("table", tmp_path, product="sku")


def test_a_table_of_products_without_captions_is_a_gallery(tmp_path):
    put(tmp_path / "t.csv", "image,group\n1.jpg,a\n2.jpg,b\n3.jpg,a\n")
    products, _ = read("table", tmp_path, product="group")
    assert [(p.id, names(p), p.captions) for p in products] == [("a", ["1.jpg", "3.jpg"], ()), ("b", ["2.jpg"], ())]


def test_a_webdataset_sample_may_have_several_pictures(tmp_path):
    files = [(f"a.{n}.jpg", drawn(colour)) for n, colour in ((10, "red"), (2, "blue"))]
    files += [("a.mask.png", b"no photo"), ("a.jpg", drawn("lime")), ("a.txt", b"a bag")]
    shard(tmp_path / "0.tar", [*files, ("b.png", drawn("red")), ("b.txt", b"a hat")])
    shard(tmp_path / "1.tar", [("b.png", drawn("blue")), ("b.txt", b"a shoe")])
    products, oddities = read("webdataset", tmp_path)
    assert oddities == [] and [product.id for product in products] == ["a", "b", "b"], (
        "another picture, another product"
    )
    assert names(products[0]) == ["a.jpg", "a.2.jpg", "a.10.jpg"] and products[0].group == ""
    assert products[0].pictures[1].read() == drawn("blue") and all(map(are_pictures, products))
    photos, _ = read("webdataset", tmp_path, "photo")
    assert [(photo.id, photo.captions) for photo in photos[:3]] == [
        ("a.jpg", ("a bag",)),
        ("a.2.jpg", ("a bag",)),
        ("a.10.jpg", ("a bag",)),
    ]
    assert len({photo.group for photo in photos[:3]}) == 1 and photos[0].group and photos[3:] == products[1:]


def test_a_tfds_example_may_have_several_pictures(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            "caption": tfds.features.Text(),
            "id": tfds.features.Text(),
        }
    )
    examples = [
        {"images": [io.BytesIO(drawn(colour)) for colour in colours], "caption": "a bag", "id": f" 0{n}  x"}
        for n, colours in enumerate((["red", "blue"], [], ["lime"]))
    ]

    class Bags(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION, code_path = "bags", tfds.core.Version("1.0.0"), None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": enumerate(examples)}

        def _generate_examples(self):
            raise NotImplementedError

    Bags(data_dir=tmp_path, file_format="array_record").download_and_prepare(download_dir=tmp_path / "downloads")
    folder = tmp_path / "bags" / "1.0.0"
    products, oddities = read("tfds", folder)
    assert [product.id for product in products] == [" 00  x", " 02  x"] and oddities == ["example without a picture"]
    assert [image.read() for image in products[0].pictures] == [drawn("red"), drawn("blue")]
    assert all(map(are_pictures, products)) and products[0].pictures[1].size == len(drawn("blue"))
    photos, _ = read("tfds", folder, "photo")
    assert [(photo.id, photo.group) for photo in photos] == [
        (" 00  x-1", "train-0"),
        (" 00  x-2", "train-0"),
        (" 02  x", ""),
    ]
    with pytest.raises(UserError, match=r"leave --config\.data\.columns\.product out"):
        read("tfds", folder, product="id")
    with pytest.raises(UserError, match=r"leave --config\.data\.columns\.product out"):
        shard(tmp_path / "0.tar", [("b.png", drawn("red")), ("b.txt", b"a hat")])
        read("webdataset", tmp_path / "0.tar", product="id")
