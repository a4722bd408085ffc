"""Drawn catalogues are deterministic and agree with their tables and ground truth."""

import csv
import hashlib
import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog.drawn import draw_catalogue
from jaxclip.catalog.drawn.canvas import Canvas
from jaxclip.catalog.drawn.catalogue import COLUMNS
from jaxclip.catalog.drawn.kinds import KINDS
from jaxclip.catalog.drawn.palette import CLOTH, METAL
from jaxclip.catalog.drawn.stock import draw_product, product_row
from jaxclip.errors import UserError

COLOUR_WORDS = re.compile("|".join(sorted((colour.name for colour in CLOTH + METAL), key=len, reverse=True)))
# Parts that fill most of their box, unlike a strap or a rim.
BROAD = {"body", "dial", "lens left", "leg left", "sole left", "wings", "blade", "brim", "flap", "toe", "strap top"}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "catalogue"
    draw_catalogue(folder, products=60, seed=5)
    return folder


def rows_of(folder):
    with (folder / "styles.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def truth_of(folder):
    return json.loads((folder / "truth.json").read_text(encoding="utf-8"))


def pixels_of(folder, product_id):
    return np.asarray(Image.open(folder / "images" / f"{product_id}.jpg")).astype(int)


def cut(pixels, box):
    left, top, width, height = box
    return pixels[top : top + height, left : left + width]


def digest(folder):
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            hashed.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def test_every_row_has_a_picture_and_ground_truth(catalogue):
    rows = rows_of(catalogue)
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == 60
    assert {path.stem for path in (catalogue / "images").iterdir()} == set(ids) == set(truth_of(catalogue))
    assert all(tuple(row) == COLUMNS and all(row.values()) for row in rows)
    assert '"' not in (catalogue / "styles.csv").read_text(encoding="utf-8")


def test_kinds_are_balanced_in_a_catalogue_of_any_size(catalogue):
    assert set(Counter(row["articleType"] for row in rows_of(catalogue)).values()) == {60 // len(KINDS)}
    kinds = Counter(product_row(5, index)["articleType"] for index in range(len(KINDS) + 7))
    assert set(kinds.values()) == {1, 2}


def test_a_product_is_the_same_in_a_catalogue_of_any_size(catalogue, tmp_path):
    draw_catalogue(tmp_path / "small", products=3, seed=5)
    assert rows_of(tmp_path / "small") == rows_of(catalogue)[:3]
    for product_id, truth in truth_of(tmp_path / "small").items():
        assert truth == truth_of(catalogue)[product_id]
        name = f"images/{product_id}.jpg"
        assert (tmp_path / "small" / name).read_bytes() == (catalogue / name).read_bytes()


def test_a_different_seed_draws_different_products(tmp_path):
    draw_catalogue(tmp_path / "one", products=2, seed=1)
    draw_catalogue(tmp_path / "two", products=2, seed=2)
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_pixels_are_the_same_on_every_machine():
    hashed = hashlib.blake2b(digest_size=16)
    for index in range(len(KINDS)):
        hashed.update(draw_product(0, index).canvas.pixels.astype("<i4").tobytes())
    assert hashed.hexdigest() == "a4f0f3c80eff39f353a01c55d857e698"


def test_files_are_the_same_on_every_machine(tmp_path):
    draw_catalogue(tmp_path / "golden", products=len(KINDS), seed=0)
    assert digest(tmp_path / "golden") == "979da400bd9dff7a7d3e6915c6e59e44"


def test_ground_truth_boxes_enclose_the_product(monkeypatch):
    monkeypatch.setattr(Canvas, "cast_shadow", lambda self, strength: None)
    for index in range(2 * len(KINDS)):
        drawing = draw_product(11, index)
        changed = (drawing.canvas.pixels != drawing.empty).any(axis=2)
        left, top, width, height = drawing.truth["box"]
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        assert top <= rows[0] <= top + 1 and top + height - 2 <= rows[-1] < top + height
        assert left <= columns[0] <= left + 1 and left + width - 2 <= columns[-1] < left + width
        for part in drawing.truth["parts"].values():
            x, y, w, h = part["box"]
            assert left <= x and top <= y and x + w <= left + width and y + h <= top + height


def test_a_shadow_only_darkens_and_only_the_background():
    for index in range(len(KINDS)):
        drawing = draw_product(11, index)
        pixels, outside = drawing.canvas.pixels, drawing.canvas.covered == 0
        assert (pixels[outside] <= drawing.empty[outside]).all()
        assert (pixels[outside] >= drawing.empty[outside] * 5 // 10).all()


def test_products_are_completely_inside_the_picture():
    for index in range(10 * len(KINDS)):
        left, top, width, height = draw_product(3, index).truth["box"]
        assert left > 0 and top > 0 and left + width < 120 and top + height < 160


def test_the_colour_in_the_name_is_in_the_picture(catalogue):
    truth = truth_of(catalogue)
    checked = 0
    for row in rows_of(catalogue):
        entry, pixels = truth[row["id"]], pixels_of(catalogue, row["id"])
        named = set(COLOUR_WORDS.findall(row["productDisplayName"]))
        parts = entry["parts"]
        assert row["baseColour"] in named <= {part["colour"] for part in parts.values()} | {entry["pattern_colour"]}
        for colour in named - {entry["pattern_colour"]}:
            shares = [
                (np.abs(cut(pixels, part["box"]) - part["rgb"]).max(axis=2) <= 45).mean()
                for part in parts.values()
                if part["colour"] == colour
            ]
            assert max(shares) >= 0.04, (row["productDisplayName"], colour, shares)
        for name in BROAD & set(parts) if entry["pattern"] == "Solid" else ():
            median = np.median(cut(pixels, parts[name]["box"]).reshape(-1, 3), axis=0)
            assert np.abs(median - parts[name]["rgb"]).max() <= 60, (row["productDisplayName"], name)
            checked += 1
    assert checked >= 20


def test_most_names_are_unique_and_some_are_shared():
    names = Counter(product_row(0, index)["productDisplayName"] for index in range(3000))
    shared = sum(count for count in names.values() if count > 1) / 3000
    assert 0.005 <= shared <= 0.08


def test_interrupted_drawing_leaves_no_files(tmp_path):
    def interrupted(indices):
        yield from list(indices)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_catalogue(tmp_path / "catalogue", products=5, seed=0, progress=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_and_unchanged(tmp_path):
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not an empty folder"):
        draw_catalogue(tmp_path / "catalogue", products=1, seed=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["catalogue", "mine.txt"]


def test_an_empty_catalogue_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        draw_catalogue(tmp_path / "catalogue", products=0, seed=0)


def test_pictures_are_rgb_jpegs_of_one_size(catalogue):
    for path in (catalogue / "images").iterdir():
        picture = Image.open(io.BytesIO(path.read_bytes()))
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (120, 160))
