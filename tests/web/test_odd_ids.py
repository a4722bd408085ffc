"""A catalogue with odd ids and names prepares, trains, is evaluated, and search links each product to its own photo."""

import csv
import json
import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import jaxclip
from jaxclip import config
from jaxclip.catalog import builder
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.pipeline import prepared_data
from jaxclip.pipeline.records import Records

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow

LONG = "long/" + "x" * 900
# id, file name (bytes, inside a sub-folder), caption. Equal ids are of different products.
ODD = [
    ("a/b", b"one/a.jpg", "slash"),
    ("a\\b", b"two/a.jpg", "backslash"),
    ("a%2Fb", b"one/b.jpg", "percent"),
    ("100% cotton", b"two/b.jpg", "spaces and percent"),
    (" padded ", b"one/c c.jpg", "white space around"),
    ("padded", b"two/c#c?.jpg", "no white space around"),
    ("0012", b"one/0012.jpg", "leading zeros"),
    ("12", b"two/0012.jpg", "no zeros"),
    ("../../etc/passwd", b"one/etc.jpg", "a path upwards"),
    ("//host/x", b"one/host.jpg", "two slashes"),
    ("a?b=c&d#e;f", b"one/query.jpg", "query characters"),
    ("schön 😀 é", b"one/unicode.jpg", "composed"),
    ("schön 😀 e\u0301", b"one/decomposed.jpg", "decomposed"),
    (LONG, b"one/long.jpg", "a very long id"),
    ("<b>&amp;'\"", b"one/html.jpg", "markup"),
    ("twice", b"one/twice.jpg", "first of two"),
    ("twice", b"two/twice.jpg", "second of two"),
    ("twice-2", b"one/twice-2.jpg", "third, whose id exists"),
    ("caf\udce9", b"one/caf\xe9.jpg", "latin 1, one"),
    ("caf\udce8", b"one/caf\xe8.jpg", "latin 1, two"),
    ("broken caption", b"one/broken.jpg", "lone byte \udcff in one"),
    ("broken caption 2", b"one/broken2.jpg", "lone byte \udcfe in two"),
    ("nul\0id", b"one/nul.jpg", "nul \0 in the texts"),
]
MISSING = ("missing", "one/a\0.jpg", "nul in the path")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A table whose bytes are not all UTF-8, and the bytes of each row's own photo."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [*ODD, *((f"plain {n}", b"two/plain%d.jpg" % n, f"plain product {n}") for n in range(24))]
    draw_catalogue(folder / "drawn", len(rows), 11)
    drawn = sorted((folder / "drawn" / "images").iterdir())
    with (folder / "shop.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption"])
        photos = []
        for (id_, name, caption), picture in zip(rows, drawn, strict=True):
            path = os.path.join(os.fsencode(folder), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            photos.append(picture.read_bytes())
            with open(path, "wb") as copy:
                copy.write(photos[-1])
            table.writerow([id_, name.decode("utf-8", errors="surrogateescape"), caption])
        table.writerow(MISSING)
    return folder / "shop.csv", rows, photos


@pytest.fixture(scope="module")
def trained_on_odd(run, config_file, shop, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    settings = ["--config.data.reader=table", f"--config.data.path={shop[0]}", "--config.data.test=6"]
    settings += ["--config.evaluation.every=0", "--config.checkpoint.every=20"]
    done = run("train", f"--config={config_file}", f"--workdir={workdir}", "--config.steps=20", *settings)
    assert done.returncode == 0, done.stderr
    done = run("evaluate", f"--workdir={workdir}", "--config.data.split=all")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((workdir / "eval" / "all" / "metrics.json").read_text())
    assert metrics["gallery"] == len(shop[1]) and metrics["checkpoint_step"] == 20
    return workdir


def captions_by_row(rows):
    """Returns the caption of each row as it is stored."""
    return [caption.encode("utf-8", errors="surrogateescape").decode(errors="replace").replace("\0", "\ufffd")
            for _, _, caption in rows]  # fmt: skip


def same_picture(one: bytes, other: bytes) -> bool:
    """Returns whether two files have nearly the same pixels; a smaller version of one may be stored."""
    small = [np.asarray(Image.open(BytesIO(each)).convert("RGB").resize((24, 24)), np.float32) for each in (one, other)]
    return float(np.abs(small[0] - small[1]).mean()) < 2


def test_ids_are_exact_unique_and_counted(trained_on_odd, shop):
    prepared = prepared_data.prepared_dataset(config.load_config(trained_on_odd), say=pytest.fail)
    products = {p.captions[0]: p for p, _ in Records(prepared, "all").products()}
    stored = [products[caption].id for caption in captions_by_row(shop[1])]
    written = [id_ for id_, _, _ in shop[1]]
    for id_, own in zip(written, stored, strict=True):
        if id_.isprintable() and id_ != "twice":
            assert own == id_
    assert sorted(own for own in stored if own.startswith("twice")) == ["twice", "twice-2", "twice-3"]
    assert stored[written.index("twice-2")] == "twice-2"
    assert {own for own in stored if own.startswith("caf")} == {"caf\ufffd", "caf\ufffd-2"}
    assert "nul\ufffdid" in stored and len(set(stored)) == len(stored)
    facts = builder.metadata(prepared)
    assert facts["dropped"] == {"image missing": 1}
    assert facts["mended"]["id of another product, made unique by a number"] == 2
    assert facts["mended"]["broken UTF-8"] == 4 and facts["mended"]["NUL character"] == 1
    card = (prepared / "card.html").read_text(encoding="utf-8")
    assert "id of another product, made unique by a number" in card and "caf\ufffd-2" in card
    names = {product.pictures[0].name for product in products.values()}
    for name in ("caf\udce9.jpg", "caf\udce8.jpg", "c#c?.jpg", "0012.jpg"):
        assert name in names, "names of files keep their bytes"


def test_every_product_of_a_search_links_to_its_own_photo_and_can_be_searched_by_its_id(trained_on_odd, shop, serve):
    from jaxclip.web.app import make_app

    searcher = jaxclip.load(trained_on_odd)
    searcher.warm_up()
    own = dict(zip(captions_by_row(shop[1]), shop[2], strict=True))
    with serve(make_app(searcher)) as address, httpx.Client(base_url=address) as client:
        found = client.get("/v1/products", params={"k": 100}).raise_for_status().json()["results"]
        assert {one["caption"] for one in found} == own.keys()
        for one in found:
            answer = client.get(one["image"]).raise_for_status()
            assert same_picture(answer.content, own[one["caption"]]), one["id"]
            others = [caption for caption, photo in own.items() if same_picture(answer.content, photo)]
            assert others == [one["caption"]]
            similar = client.get("/v1/search", params={"like": one["id"], "k": 3}).raise_for_status().json()["results"]
            assert len(similar) == 3 and one["id"] not in [each["id"] for each in similar]
        best = client.get("/v1/search", params={"q": "slash", "k": 100}).raise_for_status().json()["results"]
        assert {one["id"] for one in best} == {one["id"] for one in found}
