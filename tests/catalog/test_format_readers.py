"""Readers of general formats (COCO, Flickr30k, webdataset, TFDS), each on a small fixture in its format."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


KARPATHY = {
    "images": [
        {"filename": "1.jpg", "split": "train", "sentences": [{"raw": "Two men."}, {"raw": "Men  talk."}]},
        {"filename": "2.jpg", "split": "test", "sentences": []},
    ]
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_flickr30k.json", json.dumps(KARPATHY)),
        ("results_20130124.token", "1.jpg#0\tTwo men.\n1.jpg#1\tMen  talk.\n\nno sentence\n"),
        ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| Two men.\n1.jpg| 1| Men  talk.\n2.jpg| 0\n"),
    ],
)
def test_flickr30k_photos_have_several_captions_in_every_caption_format(tmp_path, name, content):
    put(tmp_path / "flickr30k-images/1.jpg", picture())
    put(tmp_path / name, content)
    products, oddities = read("flickr30k", tmp_path)
    assert products["1"].captions == ("Two men.", "Men talk.") and is_picture(products["1"])
    assert len(products) == 1 and len(oddities) == 1 and oddities[0][2]


def test_coco_captions_are_joined_by_image_and_photos_are_in_the_folder_of_their_partition(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "000000000008.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A cat.\n"}, {"image_id": 7, "caption": "A black cat."}],
    }
    put(tmp_path / "annotations/captions_val2017.json", json.dumps(content))
    put(tmp_path / "annotations/instances_val2017.json", "not read")
    put(tmp_path / "val2017/000000000007.jpg", picture())
    products, oddities = read("coco_captions", tmp_path)
    assert products["000000000007"].captions == ("A cat.", "A black cat.") and is_picture(products["000000000007"])
    assert products["000000000007"].attributes == {"partition": "val2017"}
    assert [kind for _, kind, _ in oddities] == ["photo without a caption"]
    put(tmp_path / "annotations/captions_val2017.json", '{"images": []}')
    with pytest.raises(UserError, match="captions_val2017.json should hold"):
        read("coco_captions", tmp_path)


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_webdataset_pictures_are_read_directly_from_the_tar(tmp_path):
    shard(
        tmp_path / "00000.tar",
        [
            ("a/0.jpg", picture("red")),
            ("a/0.txt", b"a red bag\n\na bag\n"),
            ("a/1.png", picture("blue", form="PNG")),
            ("a/1.json", json.dumps({"text": "a blue bag", "sku": 12, "class": "Bags", "tags": ["x"]}).encode()),
            ("a/2.txt", b"no picture"),
            ("a/3.jpg", picture()),
        ],
    )
    products, oddities = read("webdataset", tmp_path)
    assert products["a/0"].captions == ("a red bag", "a bag")
    assert products["a/1"].category == "Bags" and products["a/1"].attributes == {"sku": "12"}
    assert (
        products["a/0"].pictures[0].read() == picture("red")
        and str(products["a/0"].pictures[0]) == "00000.tar: a/0.jpg"
    )
    assert all(map(is_picture, products.values()))
    assert [kind for _, kind, _ in oddities] == ["sample without a picture", "sample without a caption"]
    renamed, _ = read("webdataset", tmp_path / "00000.tar", id="sku")
    assert set(renamed) == {"a/0", "12"}


def test_a_compressed_tar_is_refused_with_a_hint(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(UserError, match="decompress a .tar.gz first"):
        read("webdataset", tmp_path)


def test_any_tfds_dataset_is_read_by_the_names_of_its_features(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["hand_bag", "hat"]),
            "price": np.int64,
            "box": tfds.features.BBoxFeature(),
        }
    )

    def example(number):
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        texts = [f"bag {number}", "a  bag"] if number else []
        values = {"image": picture("red"), "captions": texts, "image_id": f"n{number}", "label": 0, "price": 5}
        return {name: io.BytesIO(v) if name == "image" else v for name, v in {**values, "box": box}.items()}

    class Bags(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name, VERSION, code_path = "bags", tfds.core.Version("1.0.0"), None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _):
            return {"train": ((n, example(n)) for n in range(3)), "test": iter([(9, example(9))])}

        def _generate_examples(self):
            raise NotImplementedError

    def store(form):
        Bags(data_dir=tmp_path / form, file_format=form).download_and_prepare(download_dir=tmp_path / "downloads")

    folder = tmp_path / "array_record" / "bags" / "1.0.0"
    store("array_record")
    products, oddities = read("tfds", folder)
    assert set(products) == {"n1", "n2", "n9"} and products["n9"].attributes["partition"] == "test"
    assert products["n1"].captions == ("bag 1", "a bag") and products["n1"].category == "hand bag"
    assert products["n1"].attributes == {"label": "hand bag", "price": "5", "partition": "train"}
    assert all(map(is_picture, products.values()))
    assert [kind for _, kind, _ in oddities] == ["example without a caption"]
    with pytest.raises(UserError, match="has no feature text .*columns.caption.*: it has"):
        read("tfds", folder, caption="text")
    store("tfrecord")
    with pytest.raises(
        UserError, match="stored as tfrecord: prepare the dataset again with file_format='array_record'"
    ):
        read("tfds", tmp_path / "tfrecord" / "bags" / "1.0.0")
