"""A workdir's searcher: results are exact, each picture is embedded once, and stale or damaged vectors are not used."""

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
    pictures = [searcher.gallery.pictures(number)[0] for number in range(len(searcher.gallery))]
    return searcher.encode_image(pictures)


def ids(results):
    return [row.id for row in results]


def test_searches_equal_brute_force(searcher):
    vectors = gallery_vectors(searcher)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for text in ("blue ballet shoes", "Red Dress", "日本 👗", "x" * 900):
        scores = vectors @ searcher.encode_text(text)
        results, best = searcher.search(text, k=25), np.sort(scores)[::-1][:25]
        np.testing.assert_allclose([row.score for row in results], best, atol=1e-5)
        np.testing.assert_allclose([scores[searcher.gallery.number(row.id)] for row in results], best, atol=1e-5)


def test_a_picture_finds_its_product_and_like_leaves_the_product_out(searcher):
    number = 7
    picture, id = searcher.gallery.pictures(number)[0], searcher.gallery.ids[number]
    by_picture, by_product = searcher.search(image=picture, k=9), searcher.search(like=id, k=8)
    assert by_picture[0].id == id and by_picture[0].score == pytest.approx(1, abs=1e-4)
    assert ids(by_product) == ids(by_picture)[1:]


def test_a_sentence_and_a_picture_are_averaged(searcher):
    picture = searcher.gallery.pictures(3)[0]
    vector = searcher.encode_text("green bag") + searcher.encode_image(picture)
    scores = gallery_vectors(searcher) @ (vector / np.linalg.norm(vector))
    results = searcher.search("green bag", image=picture, k=5)
    np.testing.assert_allclose([row.score for row in results], np.sort(scores)[::-1][:5], atol=1e-4)


def test_all_results_pass_the_filters_of_their_query_in_a_batch(searcher):
    women = searcher.search("shoes", k=60, filters={"gender": "Women"})
    assert {row.attributes["gender"] for row in women} == {"Women"}
    counts = {facet.name: dict(facet.values) for facet in searcher.gallery.facets()}
    assert len(women) == counts["gender"]["Women"]
    queries = [Query("shoes", filters={"gender": [gender]}, k=5) for gender in ("Women", "Men") * 3]
    queries.append(Query("shoes", k=5))
    for query, in_batch in zip(queries, searcher.find(queries), strict=True):
        alone = searcher.find([query])[0]
        np.testing.assert_array_equal(in_batch.numbers, alone.numbers)


def test_a_picture_may_be_a_path_bytes_an_image_or_an_array(searcher, shop):
    path = next((shop / "images").iterdir())
    expected = searcher.encode_image(path)
    with Image.open(path) as image:
        forms = [path.read_bytes(), str(path), image, np.asarray(image.convert("RGB"))]
        for vector in searcher.encode_image(forms):
            np.testing.assert_allclose(vector, expected, atol=1e-5)
    for not_a_picture in (b"<svg/>", Path("nowhere.jpg"), np.zeros((4, 4), np.uint8)):
        with pytest.raises(UserError, match="picture"):
            searcher.encode_image(not_a_picture)


def test_pictures_are_resized_with_the_filter_of_the_workdir(shop):
    encoded = next((shop / "images").iterdir()).read_bytes()
    pixels = {}
    for filter in ("bicubic", "bilinear"):
        preprocess = Preprocess(32, "squash", (0, 0, 0), (1, 1, 1), "", True, 12, filter)
        pixels[filter] = read_picture(encoded, preprocess)
        np.testing.assert_array_equal(pixels[filter], images.resize(images.decode(encoded), 32, "squash", filter))
    assert (pixels["bicubic"] != pixels["bilinear"]).any()


def test_query_pictures_are_cropped_for_towers_trained_on_crops():
    product = np.random.default_rng(0).integers(0, 120, (40, 30, 3), np.uint8)
    photo = np.full((100, 80, 3), 255, np.uint8)
    photo[20:60, 40:70] = product
    preprocess = Preprocess(32, "squash", (0, 0, 0), (1, 1, 1), "", True, 12, picture="crop")
    pixels = read_picture(photo, preprocess, ProductDescriber(padding=0.0))
    np.testing.assert_allclose(pixels.astype(int), images.resize(product, 32, "squash").numpy().astype(int), atol=2)
    blank = np.full_like(photo, 255)
    assert (read_picture(blank, preprocess, ProductDescriber()) == 255).all()


def test_notebooks_show_pictures_and_escape_markup_in_names(searcher):
    results = searcher.search("shoes", k=60)
    html = results._repr_html_()
    assert html.count("<figure") == html.count('src="data:image/') == 60
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; &lt;b&gt;bold&lt;/b&gt; shoes" in html
    assert "<b>bold" not in html and "<script" not in html
    assert repr(results[:2]).count("\n") == 1 and results[0].id in repr(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "the query is empty"),
        ({"text": " \n"}, "the query is empty"),
        ({"text": "a", "k": 0}, "k = 0"),
        ({"text": "a", "k": 101}, "k = 101"),
        ({"like": "../1"}, "no product '../1'"),
        ({"text": "a", "filters": {"gendr": "Men"}}, "did you mean 'gender'"),
    ],
)
def test_invalid_queries_are_refused(searcher, arguments, message):
    with pytest.raises(UserError, match=message):
        searcher.search(**arguments)


@pytest.fixture
def embedded(monkeypatch):
    """A list to which every write to an embedding store appends its number of vectors."""
    counts = []
    append = EmbeddingStore.append

    def append_and_count(self, keys, vectors):
        counts.append(len(keys))
        append(self, keys, vectors)

    monkeypatch.setattr(EmbeddingStore, "append", append_and_count)
    return counts


def test_a_store_is_reused_extended_and_repaired_but_not_used_for_another_checkpoint(trained, shop, embedded, tmp_path):
    workdir, gallery = tmp_path / "run", tmp_path / "shop"
    shutil.copytree(trained, workdir)
    shutil.copytree(shop, gallery)
    first = jaxclip.load(workdir, gallery)
    expected = first.search("blue shoes", k=60)
    assert sum(embedded) == len({first.gallery.pictures(number)[0] for number in range(60)})
    embedded.clear()
    assert ids(jaxclip.load(workdir, gallery).search("blue shoes", k=60)) == ids(expected) and not embedded

    table = (gallery / "styles.csv").read_text().splitlines()
    (gallery / "styles.csv").write_text("\n".join([*table, "999999," + table[5].partition(",")[2]]) + "\n")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)).save(
        gallery / "images" / "999999.jpg"
    )
    added = jaxclip.load(workdir, gallery)
    assert embedded == [1] and len(added.gallery) == 61
    assert added.search(like="999999", k=60)[0].id != "999999"
    np.testing.assert_allclose(
        gallery_vectors(added)[added.gallery.number("999999")],
        added._neighbours.of_product(added.gallery.number("999999"))[0],
        atol=1e-5,
    )

    (file,) = (workdir / "embeddings").glob("*.rows")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content[:-10])
    embedded.clear()
    repaired = jaxclip.load(workdir, shop)
    assert 1 <= sum(embedded) <= 2 and ids(repaired.search("blue shoes", k=60)) == ids(expected)

    steps = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    embedded.clear()
    older = jaxclip.load(workdir, shop, step=str(steps[0]))
    assert sum(embedded) >= 59, "vectors of the newest checkpoint were reused for an older one"
    vectors = older.encode_image([older.gallery.pictures(number)[0] for number in range(5)])
    np.testing.assert_allclose(vectors, [older._neighbours.of_product(number)[0] for number in range(5)], atol=1e-5)


def test_a_prepared_dataset_can_be_the_gallery(trained, searcher, tmp_path, cache):
    candidates = (path for path in (cache / "prepared").iterdir() if path.name.startswith("shop-"))
    prepared = next(path for path in candidates if builder.metadata(path)["products"] == 60)
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    assert ids(jaxclip.load(workdir, prepared).search("bag", k=9)) == ids(searcher.search("bag", k=9))


def test_pictures_without_captions_can_be_filtered_by_colour(trained, shop, tmp_path):
    workdir, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(trained, workdir)
    for number, path in enumerate(sorted((shop / "images").iterdir())):
        (photos / ("red", "blue")[number % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, photos / ("red", "blue")[number % 2])
    digikala = jaxclip.load(workdir, photos, overrides={"data.reader": "digikala"})
    results = digikala.search("shoes", k=3, filters={"baseColour": "red"})
    assert [row.caption for row in results] == [""] * 3 and all(row.id.startswith("red/") for row in results)
    plain = jaxclip.load(workdir, photos)  # its reader, `folder`, does not read attributes from folder names
    assert "colour" in {facet.name for facet in plain.gallery.facets()}
