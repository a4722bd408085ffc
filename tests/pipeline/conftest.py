"""A small prepared catalogue whose products all differ, so that a row of a batch identifies its record."""

import csv
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.text import train_tokenizer

TRAIN = 19


def picture(number: int) -> Image.Image:
    """Returns a smooth picture whose colours and shape depend on the number."""
    random = np.random.default_rng(number)
    small = random.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((40 + 7 * (number % 5), 50 + 11 * (number % 4)), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **settings) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **settings)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """A raw catalogue of 24 products: JPEGs of several kinds, a PNG, a grayscale JPEG and a grayscale PNG."""
    folder = tmp_path_factory.mktemp("raw")
    with (folder / "products.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "caption", "category", "colour"])
        for number in range(24):
            image = picture(number)
            form, settings = ("JPEG", {"quality": 85, "subsampling": number % 3, "progressive": number % 2 == 1})
            if number == 5:
                form, settings = "PNG", {}
            if number in (6, 7):
                image, form = image.convert("L"), ("JPEG", "PNG")[number - 6]
            path = folder / f"{number}.{form.lower()}"
            path.write_bytes(encoded(image, form, **(settings if form == "JPEG" else {})))
            rows.writerow([number, path.name, f"Item {number} cotton shirt", "Shirts", f"shade{number}"])
    return folder


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory) -> Path:
    """The prepared catalogue: 19 products for training and 5 for testing."""
    folder = tmp_path_factory.mktemp("prepared") / "shirts"
    source = builder.Source("table", raw / "products.csv", 24 - TRAIN, 0, {})
    builder.prepare(source, folder, progress=lambda items, **_: items)
    return folder


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(32, "squash", (0.5,) * 3, (0.25,) * 3, "{name} {colour}", True, 16)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([f"item {n} cotton shirt shade{n}" for n in range(24)], 300)
