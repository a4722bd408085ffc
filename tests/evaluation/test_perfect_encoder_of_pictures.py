"""Encoders of known quality on a catalogue whose products have several pictures, in every protocol and file.

The catalogue is drawn, in the layout of DeepFashion In-shop: articles with one to four photos, some of one description.
"""

import csv
import hashlib
import json
from dataclasses import replace
from io import BytesIO

import jax
import numpy as np
import pytest
from PIL import Image

from jaxclip import config
from jaxclip.catalog import builder
from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.evaluation.evaluator import Evaluator
from jaxclip.evaluation.metrics_file import write
from jaxclip.evaluation.rows import rows
from jaxclip.evaluation.tables import headline
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.towers.towers import make_preprocess, make_towers

ARTICLES, DIMENSION = 60, 64
PHOTOS = np.resize([1, 2, 3, 4], ARTICLES)
PHOTOS[:7] = 2  # those of articles of one description, so that each has a query and a gallery photo


def description(article):
    """Returns the description of an article; the first seven make groups of two, two and three."""
    name = {1: 0, 3: 2, 5: 4, 6: 4}.get(article, article)
    return f"jacket number {name} with a zip"


def direction(key):
    """Returns a random unit vector that depends only on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIMENSION)
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The raw catalogue, and the article of each of its photos in 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("raw")
    draw_catalogue(folder / "drawn", int(PHOTOS.sum()), 6)
    drawn = sorted((folder / "drawn" / "images").iterdir())
    shop, lines, photos, owners = folder / "shop", [], [], []
    for article, photo in enumerate(np.split(np.arange(len(drawn)), np.cumsum(PHOTOS)[:-1])):
        for place, number in enumerate(photo):
            name = f"img/WOMEN/Jackets/id_{article:08}/{place:02}_front.jpg"
            (shop / name).parent.mkdir(parents=True, exist_ok=True)
            (shop / name).write_bytes(drawn[number].read_bytes())
            lines.append(f"{name} id_{article:08} {'query' if place == 0 and len(photo) > 1 else 'gallery'}")
            picture = Image.open(BytesIO(drawn[number].read_bytes())).convert("RGB")
            photos.append(np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))
            owners.append(article)
    (shop / "Anno").mkdir()
    (shop / "Eval").mkdir()
    entries = [{"item": f"id_{n:08}", "color": "Red", "description": [description(n)]} for n in range(ARTICLES)]
    (shop / "Anno" / "list_description_inshop.json").write_text(json.dumps(entries))
    partition = [str(len(lines)), "image_name item_id evaluation_status", *lines]
    (shop / "Eval" / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return shop, np.stack(photos).reshape(len(photos), -1).astype(np.float32), np.array(owners)


@pytest.fixture(scope="module")
def evaluator(raw, tmp_path_factory, quick_compilation):
    prepared = tmp_path_factory.mktemp("prepared") / "shop"
    source = builder.Source("deepfashion_inshop", raw[0], 0, 0, {})
    builder.prepare(source, prepared, progress=lambda items, **_: items)
    data, evaluation = {"image_size": 32, "context_length": 64}, {"batch_size": 48, "trial_size": 32}
    configuration = config.build({"steps": 1, "data": data, "model": {"preset": "tiny"}, "evaluation": evaluation})
    tokenizer = train_tokenizer([description(article) for article in range(ARTICLES)], 300)
    towers = make_towers(configuration, make_preprocess(configuration), tokenizer)
    with jax.set_mesh(towers.mesh):
        yield Evaluator(towers, Records(prepared, "all"), configuration)


def complete(evaluator, of_article, of_caption):
    """Returns the complete result of an encoder of (article, photo) and of a caption's text."""

    def encode_text(params, tokens):
        texts = evaluator.towers.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        return np.stack([of_caption(" ".join(caption.split())) for caption in texts]).astype(np.float32)

    evaluator.encoders.image, evaluator.encoders.text = of_article, encode_text
    return evaluator.complete({})


def nearest_photos(raw, pixels):
    """Returns the number of the raw photo that each row of pixels shows."""
    _, photos, _ = raw
    return [np.square(photos - row).sum(axis=1).argmin() for row in pixels.reshape(len(pixels), -1).astype(np.float32)]


@pytest.fixture(scope="module")
def perfect(evaluator, raw):
    """The complete result of an encoder that knows each photo's description, and tells articles of one apart."""

    def encode_image(params, pixels):
        articles = raw[2][nearest_photos(raw, np.asarray(pixels))]
        vectors = [direction(description(article)) + 0.05 * direction(int(article)) for article in articles]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)

    return complete(evaluator, encode_image, direction)


def test_a_perfect_encoder_scores_one_in_every_protocol_and_the_ceiling_in_pairs(perfect):
    figures, _ = perfect
    for name, part in (("groups", figures), ("single", figures["single"]), ("trials", figures["trials"])):
        for side in ("text_to_image", "image_to_text"):
            assert part[side]["hit@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}, name
            assert part[side]["map"]["value"] == 1.0, name
    assert (figures["queries"], figures["gallery"]) == (ARTICLES, ARTICLES)
    single = figures["single"]
    assert single["queries"] == single["gallery"] == ARTICLES - 4 and single["draws"] == 10
    pairs = figures["pairs"]
    assert pairs["ceiling"] == {"hit@1": (ARTICLES - 4) / ARTICLES, "hit@5": 1.0, "hit@10": 1.0}
    for name, ceiling in pairs["ceiling"].items():
        assert pairs["text_to_image"][name]["value"] == pytest.approx(ceiling)
    pictures = figures["image_to_image"]
    assert pictures["hit@1"]["value"] == pictures["recall@10"]["value"] == 1.0
    assert pictures["split"] == "catalogue" and pictures["queries"] == (PHOTOS > 1).sum()
    assert pictures["gallery"] == ARTICLES and pictures["pictures"] == PHOTOS.sum() - pictures["queries"]


def test_every_protocol_is_in_each_file_of_the_results(evaluator, perfect, tmp_path):
    provenance = {"parameters": "raw", "config_fingerprint": "c", "data_fingerprint": "d"}
    metrics = write(tmp_path / "all", perfect, evaluator, workdir=tmp_path, step=7, provenance=provenance)
    assert json.loads((tmp_path / "all" / "metrics.json").read_text()) == metrics
    with (tmp_path / "all" / "metrics.csv").open(newline="") as file:
        stored = {(row["protocol"], row["direction"], row["metric"]): row for row in csv.DictReader(file)}
    html, table = (tmp_path / "all" / "report.html").read_text(), headline(metrics)
    protocols = {row.protocol for row in rows(metrics)}
    assert protocols == {"groups", "pairs", "single", "image_to_image", "trials", "marqo"}
    for row in rows(metrics):
        for name, figure in row.figures.items():
            line = stored[row.protocol, row.direction, name]
            assert float(line["value"]) == pytest.approx(figure["value"], rel=1e-5)
        if row.protocol in protocols - {"trials", "marqo"}:
            assert row.protocol.replace("_", " ") in table and row.protocol.replace("_", " ") in html
    assert stored["pairs", "text_to_image", "hit@1"]["ceiling"] == "0.933333"
    assert "0.933" in table and "at most 93.3%" in html
    assert stored["single", "text_to_image", "hit@1"]["gallery"] == str(ARTICLES - 4)


def test_a_random_encoder_scores_chance_in_every_protocol(evaluator, raw):
    within, deviations = [], []
    for seed in range(6):

        def encode_image(params, pixels, seed=seed):
            return np.stack([direction((seed, int(n))) for n in nearest_photos(raw, np.asarray(pixels))])

        figures, _ = complete(evaluator, encode_image, lambda caption, seed=seed: direction((seed, caption)))
        for row in rows(figures):
            for name, chance in row.chance.items():
                figure = row.figures[name]
                within.append(figure["low"] <= chance <= figure["high"])
                deviations.append((figure["value"] - chance) / np.sqrt(chance * (1 - chance) / row.queries))
    assert np.mean(within) > 0.8
    assert abs(np.mean(deviations)) < 0.5


def with_sources(evaluator, monkeypatch, sources):
    """Gives the products the names of catalogues, and random vectors to captions and pictures; returns the vectors."""
    products = [replace(p, source=name) for p, name in zip(evaluator.queries.products, sources, strict=True)]
    monkeypatch.setattr(evaluator, "queries", replace(evaluator.queries, products=products))
    random = np.random.default_rng(0)
    texts, pictures = (random.normal(size=(size, 8)).astype(np.float32) for size in (ARTICLES, PHOTOS.sum()))
    labels = random.normal(size=(999, 8)).astype(np.float32)
    monkeypatch.setattr(evaluator.encoders, "pictures", lambda *_, **__: pictures)
    monkeypatch.setattr(
        evaluator.encoders, "captions", lambda _, found, **__: texts if len(found) == ARTICLES else labels[: len(found)]
    )
    return texts.astype(np.float64), pictures.astype(np.float64)


def test_each_catalogue_of_a_mixture_is_ranked_by_itself_and_counts_the_same_in_the_mean(evaluator, monkeypatch):
    queries = evaluator.queries
    sources = np.where(queries.product_groups % 3 == 0, "small", "large")
    texts, pictures = with_sources(evaluator, monkeypatch, sources)
    scores = texts @ pictures.T  # each product has one caption
    scores = np.stack([scores[:, queries.picture_owners == product].max(axis=1) for product in range(ARTICLES)], axis=1)
    figures, _ = evaluator.complete({})
    assert list(figures["sources"]) == ["large", "small"]
    for name, part in figures["sources"].items():
        own = np.flatnonzero(sources == name)
        best = scores[np.ix_(own, own)].argmax(axis=1)
        groups = queries.product_groups[own]
        assert part["text_to_image"]["hit@1"]["value"] == pytest.approx(np.mean(groups[best] == groups))
        assert part["pairs"]["text_to_image"]["hit@1"]["value"] == pytest.approx(np.mean(best == np.arange(len(own))))
        assert part["queries"] == part["gallery"] == len(own)
    for hit, value in figures["mean_of_sources"]["pairs"]["text_to_image"].items():
        parts = [part["pairs"]["text_to_image"][hit]["value"] for part in figures["sources"].values()]
        assert value == pytest.approx(np.mean(parts))
    shown = [row for row in rows(figures) if row.source]
    assert {(row.source, row.protocol, row.direction) for row in shown} == {
        (source, protocol, direction)
        for source in ("large", "small", "mean")
        for protocol in ("groups", "pairs")
        for direction in ("text_to_image", "image_to_text")
    }


def test_a_catalogue_that_cannot_be_ranked_by_itself_says_why(evaluator, monkeypatch):
    """One of its two products has no caption but that of a product of the other catalogue."""
    queries = evaluator.queries
    numbers, counts = np.unique(queries.product_groups, return_counts=True)
    undescribed = np.flatnonzero(queries.product_groups == numbers[counts > 1][0])[0]
    other = np.flatnonzero(queries.product_groups == numbers[counts == 1][0])[0]
    sources = np.full(ARTICLES, "large")
    sources[[undescribed, other]] = "small"
    texts, _ = with_sources(evaluator, monkeypatch, sources)
    kept = np.flatnonzero(queries.caption_products != undescribed)
    captions = [queries.captions[row] for row in kept]
    monkeypatch.setattr(
        evaluator,
        "queries",
        replace(evaluator.queries, captions=captions, caption_products=queries.caption_products[kept]),
    )
    monkeypatch.setattr(evaluator.encoders, "captions", lambda _, found, **__: np.resize(texts, (len(found), 8)))
    figures, _ = evaluator.complete({})
    assert "1 of 2 queries have no relevant item" in figures["sources"]["small"]["reason"]
    assert "image_to_text" not in figures["pairs"] and figures["single"]["draws"] == 10
    large = figures["sources"]["large"]["text_to_image"]["hit@1"]["value"]
    assert figures["mean_of_sources"]["groups"]["text_to_image"]["hit@1"] == pytest.approx(large)
    assert "catalogue small: 1 of 2 queries" in headline(figures)
