"""The complete evaluation (records, decoding, tokens, batches, padding, ranks, files) with encoders of known quality.

A perfect encoder scores 1, and a random encoder scores chance.
"""

import csv
import hashlib
import json
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
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.text import train_tokenizer
from jaxclip.towers.towers import make_preprocess, make_towers

PRODUCTS, DIMENSION = 140, 64
KEYS = {
    "text_to_image", "image_to_text", "by_category", "trials", "chance", "queries", "gallery", "checkpoint_step",
    "config_fingerprint", "data_fingerprint",
}  # fmt: skip


@pytest.fixture(scope="module")
def raw_catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "drawn"
    draw_catalogue(folder, PRODUCTS, 5)
    return folder


@pytest.fixture(scope="module")
def records(raw_catalogue, tmp_path_factory):
    prepared = tmp_path_factory.mktemp("prepared") / "drawn"
    builder.prepare(builder.Source("drawn", raw_catalogue, 0, 0, {}), prepared, progress=lambda items, **_: items)
    return Records(prepared, "all")


@pytest.fixture(scope="module")
def evaluator(records):
    data, evaluation = {"image_size": 32, "context_length": 128}, {"batch_size": 48}
    configuration = config.build({"steps": 1, "data": data, "model": {"preset": "tiny"}, "evaluation": evaluation})
    preprocess = make_preprocess(configuration)
    tokenizer = train_tokenizer(["a shirt", "a watch"], 300)
    towers = make_towers(configuration, preprocess, tokenizer)
    with jax.set_mesh(towers.mesh):
        yield Evaluator(towers, records, configuration)


def random_direction(key) -> np.ndarray:
    """Returns a random unit vector that depends only on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).normal(size=DIMENSION)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class PerfectEncoders:
    """Encoders that identify the product of a picture or caption and return the random direction of its name.

    A picture is matched to the product with the nearest photo, a caption to the product whose name it begins with. The
    photos and names are read from the raw catalogue, independently of the pipeline under test.
    """

    def __init__(self, raw_catalogue, tokenizer):
        with (raw_catalogue / "styles.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        self.names = [" ".join(row["productDisplayName"].lower().split()) for row in rows]
        photos = [Image.open(BytesIO((raw_catalogue / "images" / f"{row['id']}.jpg").read_bytes())) for row in rows]
        small = [np.asarray(photo.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) for photo in photos]
        self.photos = np.stack(small).reshape(len(rows), -1).astype(np.float32)
        self.tokenizer = tokenizer

    def encode_image(self, params, pixels):
        rows = np.asarray(pixels).reshape(len(pixels), -1).astype(np.float32)
        nearest = [np.square(self.photos - row).sum(axis=1).argmin() for row in rows]
        return np.stack([random_direction(self.names[product]) for product in nearest])

    def encode_text(self, params, tokens):
        captions = self.tokenizer.batch_decode(np.asarray(tokens), skip_special_tokens=True)
        matches = [[name for name in self.names if caption.strip().startswith(name)] for caption in captions]
        return np.stack([random_direction(max(names, key=len)) for names in matches])


def rank(evaluator, encode_image, encode_text):
    evaluator.encoders.image, evaluator.encoders.text = encode_image, encode_text
    return evaluator.rank({})


def random_encoder(side, seed):
    """Returns an encoder that maps every distinct picture or caption to a random direction."""

    def encode(params, rows):
        return np.stack([random_direction((side, seed, row.tobytes())) for row in np.asarray(rows)])

    return encode


def test_a_perfect_encoder_scores_one_in_metrics_json_and_the_report(evaluator, raw_catalogue, tmp_path):
    perfect = PerfectEncoders(raw_catalogue, evaluator.towers.tokenizer)
    result = rank(evaluator, perfect.encode_image, perfect.encode_text)
    folder = tmp_path / "run" / "eval" / "all"
    provenance = {"parameters": "raw", "config_fingerprint": "c", "data_fingerprint": "d"}
    write(folder, result, evaluator, workdir=tmp_path / "run", step=7, provenance=provenance)
    metrics = json.loads((folder / "metrics.json").read_text())

    assert metrics.keys() >= KEYS
    for side in ("text_to_image", "image_to_text"):
        assert metrics[side]["hit@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert metrics[side]["mrr"]["value"] == metrics[side]["map"]["value"] == 1.0
        assert metrics["trials"][side]["hit@1"]["value"] == 1.0
    assert {row["hit@1"]["value"] for row in metrics["by_category"].values()} == {1.0}
    assert sum(row["queries"] for row in metrics["by_category"].values()) == PRODUCTS
    assert metrics["queries"] == metrics["gallery"] == PRODUCTS and metrics["nan_scores"] == 0
    assert (metrics["checkpoint_step"], metrics["config_fingerprint"], metrics["data_fingerprint"]) == (7, "c", "d")
    html = (folder / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 24 and "100.0%" in html


def test_a_random_encoder_scores_chance_within_the_interval(evaluator):
    runs = [rank(evaluator, random_encoder("image", seed), random_encoder("text", seed))[0] for seed in range(4)]
    assert runs[0]["chance"]["hit@10"] == pytest.approx(10 / PRODUCTS, rel=0.15)
    within = []
    for side, expected in (("text_to_image", "chance"), ("image_to_text", "chance_image_to_text")):
        for name, chance in runs[0][expected].items():
            figures = [metrics[side][name] for metrics in runs]
            within += [figure["low"] <= chance <= figure["high"] for figure in figures]
            deviation = np.sqrt(chance * (1 - chance) / (PRODUCTS * len(runs)))
            assert abs(np.mean([figure["value"] for figure in figures]) - chance) < 3 * deviation
    assert np.mean(within) > 0.8  # less than 0.95, because each interval is based on a handful of hits


def test_a_perfect_encoder_fails_if_pictures_are_shuffled(evaluator, raw_catalogue):
    perfect = PerfectEncoders(raw_catalogue, evaluator.towers.tokenizer)

    def encode_shuffled(params, rows):
        return np.roll(perfect.encode_image(params, rows), 1, axis=0)

    metrics, _ = rank(evaluator, encode_shuffled, perfect.encode_text)
    assert metrics["text_to_image"]["hit@1"]["value"] < 0.1


def test_each_label_is_embedded_from_its_own_prompts(evaluator, monkeypatch):
    product_labels = [[product.category, *product.attributes.values()] for product in evaluator.queries.products]
    known_labels = sorted({label.lower() for labels in product_labels for label in labels}, key=len)

    def captions(params, wordings, **_):
        longest = [[label for label in known_labels if label in wording.lower()][-1] for wording in wordings]
        return np.stack([random_direction(label) for label in longest])

    def pictures(params, records, **_):
        return np.stack([sum(random_direction(label.lower()) for label in labels) for labels in product_labels])

    monkeypatch.setattr(evaluator.encoders, "captions", captions)
    monkeypatch.setattr(evaluator.encoders, "pictures", pictures)
    figures, _ = evaluator.complete({})
    assert len(figures["zero_shot"]) >= 3 and figures["zero_shot"].keys() == figures["label_queries"].keys()
    for name, scores in figures["zero_shot"].items():
        # Less than 1, because random directions in 64 dimensions are not orthogonal.
        assert scores["weighted_f1"]["value"] > 0.6, name
