"""A workdir's searcher: exact answers, each picture embedded once, nothing stale or damaged ever served."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxclip
from jaxclip.catalog import builder
from jaxclip.errors import UserError
from jaxclip.features.describe import ProductDescriber
from jaxclip.pipeline import images
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.serving.open import read_picture
from jaxclip.serving.searcher import Query
from jaxclip.towers.store import EmbeddingStore

pytestmark = pytest.mark.slow


def gallery_vectors(searcher):
    pictures = [searcher.gallery.picture(number) for number in range(len(searcher.gallery))]
    return searcher.encode_image(pictures)


def ids(results):
    return [row.id for row in results]


def test_searches_equal_brute_force(searcher):
    vectors = gallery_vectors(searcher)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text in ("blue ballet shoes", "Red Dress", "日本 👗", "x" * 900):
        scores = vectors @ searcher.encode_text(text)
        found = searcher.search(text, k=25)
        np.testing.assert_allclose([row.score for row in found], np.sort(scores)[::-1][:25], atol=1e-5)
        np.testing.assert_allclose(
            [scores[searcher.gallery.number(row.id)] for row in found], np.sort(scores)[::-1][:25], atol=1e-5
        )


def test_a_picture_finds_itself_and_likeness_leaves_the_product_out(searcher):
    number = 7
    picture, id = searcher.gallery.picture(number), searcher.gallery.ids[number]
    by_picture, like = searcher.search(image=picture, k=9), searcher.search(like=id, k=8)
    assert by_picture[0].id == id and by_picture[0].score == pytest.approx(1, abs=1e-4)
    assert ids(like) == ids(by_picture)[1:]


def test_a_sentence_and_a_picture_are_averaged(searcher):
    picture = searcher.gallery.picture(3)
    both = searcher.encode_text("green bag") + searcher.encode_image(picture)
    scores = gallery_vectors(searcher) @ (both / np.linalg.norm(both))
    found = searcher.search("green bag", image=picture, k=5)
    np.testing.assert_allclose([row.score for row in found], np.sort(scores)[::-1][:5], atol=1e-4)


def test_filters_hold_for_every_row_and_for_each_query_of_a_batch(searcher):
    women = searcher.search("shoes", k=60, filters={"gender": "Women"})
    assert {row.attributes["gender"] for row in women} == {"Women"}
    assert len(women) == dict(dict((f.name, f.values) for f in searcher.gallery.facets())["gender"])["Women"]
    queries = [Query("shoes", filters={"gender": [g]}, k=5) for g in ("Women", "Men") * 3] + [Query("shoes", k=5)]
    for query, found in zip(queries, searcher.find(queries), strict=True):
        alone = searcher.find([query])[0]
        np.testing.assert_array_equal(found.numbers, alone.numbers)


def test_pictures_may_be_paths_bytes_images_or_arrays(searcher, shop):
    path = next((shop / "images").iterdir())
    expected = searcher.encode_image(path)
    with Image.open(path) as image:
        rgb = image.convert("RGB")
        same = [path.read_bytes(), str(path), image, np.asarray(rgb)]
        for vector in searcher.encode_image(same):
            np.testing.assert_allclose(vector, expected, atol=1e-5)
    for wrong in (b"<svg/>", Path("nowhere.jpg"), np.zeros((4, 4), np.uint8)):
        with pytest.raises(UserError, match="picture"):
            searcher.encode_image(wrong)


def test_pictures_are_resized_as_the_workdir_says(shop):
    encoded = next((shop / "images").iterdir()).read_bytes()
    seen = {}
    for filter in ("bicubic", "bilinear"):
        preprocess = Preprocess(32, "squash", (0, 0, 0), (1, 1, 1), "", True, 12, filter)
        seen[filter] = read_picture(encoded, preprocess)
        np.testing.assert_array_equal(seen[filter], images.resize(images.decode(encoded), 32, "squash", filter))
    assert (seen["bicubic"] != seen["bilinear"]).any()


def test_towers_that_see_crops_get_one_of_the_picture_that_is_searched_with():
    product = np.random.default_rng(0).integers(0, 120, (40, 30, 3), np.uint8)
    photo = np.full((100, 80, 3), 255, np.uint8)
    photo[20:60, 40:70] = product
    preprocess = Preprocess(32, "squash", (0, 0, 0), (1, 1, 1), "", True, 12, picture="crop")
    seen = read_picture(photo, preprocess, ProductDescriber(padding=0.0))
    np.testing.assert_allclose(seen.astype(int), images.resize(product, 32, "squash").numpy().astype(int), atol=2)
    blank = np.full_like(photo, 255)
    assert (read_picture(blank, preprocess, ProductDescriber()) == 255).all()


def test_rows_render_their_pictures_with_names_as_text(searcher):
    found = searcher.search("shoes", k=60)
    shown = found._repr_html_()
    assert shown.count("<figure") == shown.count('src="data:image/') == 60
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;bold&lt;/b&gt; shoes" in shown
    assert "<b>bold" not in shown and "<script" not in shown
    assert repr(found[:2]).count("\n") == 1 and found[0].id in repr(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing is searched for"),
        ({"text": " \n"}, "nothing is searched for"),
        ({"text": "a", "k": 0}, "k = 0"),
        ({"text": "a", "k": 101}, "k = 101"),
        ({"like": "../1"}, "no product '../1'"),
        ({"text": "a", "filters": {"gendr": "Men"}}, "did you mean 'gender'"),
    ],
)
def test_what_cannot_be_searched_for_is_told(searcher, arguments, words):
    with pytest.raises(UserError, match=words):
        searcher.search(**arguments)


@pytest.fixture
def embedded(monkeypatch):
    """Counts the vectors that are written to stores."""
    counted = []
    append = EmbeddingStore.append

    def count(self, keys, vectors):
        counted.append(len(keys))
        append(self, keys, vectors)

    monkeypatch.setattr(EmbeddingStore, "append", count)
    return counted


def test_a_store_is_taken_up_extended_repaired_or_left_for_another_checkpoint(trained, shop, embedded, tmp_path):
    workdir, grown = tmp_path / "run", tmp_path / "shop"
    shutil.copytree(trained, workdir)
    shutil.copytree(shop, grown)
    first = jaxclip.load(workdir, grown)
    expected = first.search("blue shoes", k=60)
    assert sum(embedded) == len(set(map(first.gallery.picture, range(60))))
    embedded.clear()
    assert ids(jaxclip.load(workdir, grown).search("blue shoes", k=60)) == ids(expected) and not embedded

    table = (grown / "styles.csv").read_text().splitlines()
    (grown / "styles.csv").write_text("\n".join([*table, "999999," + table[5].partition(",")[2]]) + "\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(
        grown / "images" / "999999.jpg"
    )
    added = jaxclip.load(workdir, grown)
    assert embedded == [1] and len(added.gallery) == 61
    assert added.search(like="999999", k=60)[0].id != "999999"
    np.testing.assert_allclose(
        gallery_vectors(added)[added.gallery.number("999999")],
        added._neighbours.vector(added.gallery.number("999999")),
        atol=1e-5,
    )

    (file,) = (workdir / "embeddings").glob("*.rows")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw[:-10])
    embedded.clear()
    repaired = jaxclip.load(workdir, shop)
    assert 1 <= sum(embedded) <= 2 and ids(repaired.search("blue shoes", k=60)) == ids(expected)

    steps = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    embedded.clear()
    older = jaxclip.load(workdir, shop, step=str(steps[0]))
    assert sum(embedded) >= 59, "vectors of the newest checkpoint were taken for an older one"
    vectors = older.encode_image([older.gallery.picture(number) for number in range(5)])
    np.testing.assert_allclose(vectors, [older._neighbours.vector(number) for number in range(5)], atol=1e-5)


def test_a_prepared_gallery_is_taken_as_it_is(trained, searcher, tmp_path, cache):
    named = (path for path in (cache / "prepared").iterdir() if path.name.startswith("shop-"))
    prepared = next(path for path in named if builder.metadata(path)["products"] == 60)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert ids(jaxclip.load(workdir, prepared).search("bag", k=9)) == ids(searcher.search("bag", k=9))


def test_pictures_without_a_word_are_searched_by_measured_colour(trained, shop, tmp_path):
    workdir, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(trained, workdir)
    for number, path in enumerate(sorted((shop / "images").iterdir())):
        (photos / ("red", "blue")[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, photos / ("red", "blue")[number % 2])
    digikala = jaxclip.load(workdir, photos, overrides={"data.reader": "digikala"})
    found = digikala.search("shoes", k=3, filters={"baseColour": "red"})
    assert [row.caption for row in found] == [""] * 3 and all(row.id.startswith("red/") for row in found)
    plain = jaxclip.load(workdir, photos)  # a folder: its names are no attribute
    assert "colour" in {facet.name for facet in plain.gallery.facets()}
