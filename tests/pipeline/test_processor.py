"""Pictures and captions are preprocessed as by the libraries that trained the towers."""

import csv
import gzip
import json
import os
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from jaxclip.errors import UserError
from jaxclip.pipeline import images, processor, text
from jaxclip.pipeline.clip_tokenizer import clip_tokenizer

CAPTIONS = {"caption_template": "{name}", "lowercase": False, "context_length": 77}
CLIP = {
    "crop_size": 64, "size": 64, "do_center_crop": True, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.2] * 3,
}  # fmt: skip
SIGLIP = {
    "size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip
REAL = Path(os.environ.get("JAXCLIP_REAL_DATA", ""))
real = pytest.mark.skipif("JAXCLIP_REAL_DATA" not in os.environ, reason="JAXCLIP_REAL_DATA is not set")


def test_old_and_new_formats_of_clips_processor_are_equivalent():
    new = {**CLIP, "size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "rescale_factor": 1 / 255}
    old = processor.from_hugging_face(CLIP, Path("p"), **CAPTIONS)
    assert old == processor.from_hugging_face(new, Path("p"), **CAPTIONS)
    assert old == processor.from_hugging_face({"image_processor": new}, Path("p"), **CAPTIONS)
    assert (old.image_size, old.resize, old.filter, old.std) == (64, "crop", "bicubic", (0.2,) * 3)


@pytest.mark.parametrize("settings", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_written_settings_are_read_back(settings):
    read = processor.from_hugging_face(settings, Path("p"), **CAPTIONS)
    written = processor.to_hugging_face(read, "CLIP")
    assert processor.from_hugging_face(json.loads(json.dumps(written)), Path("p"), **CAPTIONS) == read
    open_clip = processor.to_open_clip(read)
    assert processor.from_open_clip(open_clip, Path("p"), image_size=64, **CAPTIONS) == read


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 72}, r"size = 72"),
        ({"resample": 1}, "resample = 1"),
        ({"do_normalize": False}, "do_normalize = False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.00784"),
        ({"image_mean": None, "image_std": [0.5]}, r"image_mean = None, image_std = \[0.5\]"),
        ({"size": None}, "size = None"),
    ],
)
def test_unsupported_preprocessing_is_refused(change, message):
    with pytest.raises(UserError, match=f"p asks for preprocessing that is not supported: {message}"):
        processor.from_hugging_face({**CLIP, **change}, Path("p"), **CAPTIONS)


@real
@pytest.mark.parametrize("settings", [CLIP, SIGLIP, {**SIGLIP, "resample": 3}], ids=["clip", "siglip2", "siglip"])
def test_real_photos_are_preprocessed_as_by_transformers(settings):
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    kind = clip.CLIPImageProcessorPil if "crop_size" in settings else siglip.SiglipImageProcessorPil
    sides = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    side = {"size": {"height": 224, "width": 224}}
    settings = {**settings, **(sides if "crop_size" in settings else side)}
    theirs = kind(**settings)
    ours = processor.from_hugging_face(theirs.to_dict(), Path("p"), **CAPTIONS)
    scale, shift = np.asarray(ours.std) * 255, np.asarray(ours.mean) * 255

    @tf.function(reduce_retracing=True)
    def prepare(encoded):
        return images.resize(images.decode(encoded), ours.image_size, ours.resize, ours.filter)

    paths = sorted((REAL / "fashion-products" / "images").iterdir())[::60]
    assert len(paths) >= 100
    shapes = set()
    for path in paths:
        picture = Image.open(path).convert("RGB")
        expected = theirs(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0) * scale + shift
        pixels = prepare(tf.constant(path.read_bytes())).numpy()
        np.testing.assert_allclose(pixels, expected, atol=1e-3, err_msg=str(path))
        shapes.add(picture.size)
    assert len(shapes) > 1


@cache
def reference():
    """Returns encode(caption) -> ids: byte-pair encoding that applies merges in the order of the vocabulary file."""
    regex = pytest.importorskip("regex")
    path = REAL / "clip-tokenizer" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1:48_895]
    merges = [tuple(line.split()) for line in lines]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    units = list(symbols.values())
    ids = {unit: n for n, unit in enumerate([*units, *(f"{u}</w>" for u in units), *("".join(m) for m in merges)])}
    order = {merge: n for n, merge in enumerate(merges)}
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

    @cache
    def split(word):
        *units, last = (symbols[byte] for byte in word.encode())
        units = [*units, f"{last}</w>"]
        while len(units) > 1:
            best = min(pairwise(units), key=lambda pair: order.get(pair, len(order)))
            if best not in order:
                break
            merged, place = [], 0
            while place < len(units):
                joins = tuple(units[place : place + 2]) == best
                merged.append("".join(best) if joins else units[place])
                place += 2 if joins else 1
            units = merged
        return [ids[unit] for unit in units]

    def encode(caption):
        tokens = [token for word in words.findall(" ".join(caption.split()).lower()) for token in split(word)]
        return [49_406, *tokens, 49_407]

    return encode


@real
@pytest.mark.parametrize("form", ["vocabulary", "files"])
def test_token_ids_of_every_real_caption_equal_the_reference(tmp_path, form):
    tokenizer = text.load_tokenizer(REAL / "clip-tokenizer" / "bpe_simple_vocab_16e6.txt.gz")
    if form == "files":  # a checkpoint's vocab.json and merges.txt
        state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
        merges = "".join(f"{' '.join(merge)}\n" for merge in state["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        tokenizer = text.load_tokenizer(tmp_path)
    with (REAL / "fashion-products-small" / "styles.csv").open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.reader(file, quoting=csv.QUOTE_NONE)
        next(rows)
        captions = [",".join(row[9:]) for row in rows]
    assert len(captions) == 41_446
    expected = [reference()(caption) for caption in captions]
    assert max(map(len, expected)) <= 77
    rows = [row + [49_407] * (77 - len(row)) for row in expected]
    np.testing.assert_array_equal(text.encode(tokenizer, captions, 77), rows)
    for caption in ("", "a", "Ünïcode 棉 🧥 it's 42's!?", "shirt " * 200, "x" * 500):
        ids = reference()(caption)
        ids = ids if len(ids) <= 77 else [*ids[:76], 49_407]
        np.testing.assert_array_equal(text.encode(tokenizer, [caption], 77)[0][: len(ids)], ids)


def test_a_file_that_is_not_openais_vocabulary_is_refused(tmp_path):
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    for content in (b"", b"no gzip", gzip.compress(b"only\na few\nlines")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"is not OpenAI's bpe_simple_vocab_16e6\.txt\.gz"):
            clip_tokenizer(path)


def test_a_saved_tokenizer_has_no_truncation_or_padding(tmp_path, tokenizer):
    text.encode(tokenizer, ["a shirt"], 5)
    text.save_tokenizer(tokenizer, tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    text.save_tokenizer(loaded, tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None
    assert "max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_pictures_are_resized_with_the_filter_of_the_preprocessing(prepared, preprocess):
    from jaxclip.pipeline.batches import image_batches
    from jaxclip.pipeline.records import Records

    records = Records(prepared, "all")
    sharp, soft = (
        next(iter(image_batches(records, replace(preprocess, filter=name), batch_size=24))).astype(int)
        for name in ("bicubic", "bilinear")
    )
    assert 1 < np.abs(sharp - soft).max() < 60
