"""A preparation stores unusual picture files upright and describes them correctly, or drops and counts them."""

import csv
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxclip.catalog import builder
from jaxclip.pipeline.records import Records

ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT = 120, 160
BOX = 20, 60, 80, 150  # left, top, right, bottom of the product, in pixels
CODE = """
import re, sys
from pathlib import Path
from jaxclip.catalog import builder
from jaxclip.features.describe import ProductDescriber

for catalogue, prepared in zip(sys.argv[1::2], sys.argv[2::2]):
    source = builder.Source("table", Path(catalogue) / "shop.csv", 0, 0, {}, ProductDescriber())
    builder.prepare(source, Path(prepared), progress=lambda items, **_: items, workers=1)
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def photo(colour="red", mode="RGB"):
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    image.paste(colour, BOX)
    return image.convert(mode)


def sixteen_bits():
    grey = np.asarray(photo((128, 128, 128), "L")).astype(np.uint16) * 257
    return Image.fromarray(grey)


def png_of_zeros(path, width, height, channels):
    """Writes a black PNG of any size without holding its pixels in memory."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + width * channels)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def write_catalogue(folder, names):
    with (folder / "shop.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "caption"])
        table.writerows([Path(name).stem, name, f"Shirt {number}"] for number, name in enumerate(names))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Returns the dataset prepared from odd files, and the bytes by which they raise the peak memory."""
    plain, odd = (tmp_path_factory.mktemp(name) for name in ("plain", "odd"))
    for number in range(64):
        photo().save(plain / f"{number}.jpg", quality=95)
    write_catalogue(plain, [f"{number}.jpg" for number in range(64)])

    photo().save(odd / "plain.png")
    photo(mode="CMYK").save(odd / "cmyk.jpg", quality=95)
    photo().quantize(8).save(odd / "palette.png")
    photo().save(odd / "animated.gif", save_all=True, append_images=[photo("blue"), photo("green")])
    photo().save(odd / "moving.png", save_all=True, append_images=[photo("blue")])
    rotated, exif = photo().transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    rotated.save(odd / "rotated.jpg", exif=exif, quality=95)
    sixteen_bits().save(odd / "sixteen.png")
    clear = photo().convert("RGBA")
    clear.putalpha(photo("black", "L").point(lambda value: 255 - value))
    clear.save(odd / "transparent.webp", lossless=True)
    png_of_zeros(odd / "large.png", 7000, 7000, 3)
    png_of_zeros(odd / "bomb.png", 20_000, 20_000, 1)
    (odd / "empty.jpg").touch()
    (odd / "page.jpg").write_text("<html>404</html>")
    whole = BytesIO()
    photo().save(whole, "JPEG")
    (odd / "cut.jpg").write_bytes(whole.getvalue()[: whole.tell() // 2])
    write_catalogue(odd, sorted(path.name for path in odd.iterdir() if path.suffix != ".csv"))

    code, out = tmp_path_factory.mktemp("script") / "prepare_it.py", tmp_path_factory.mktemp("prepared")
    code.write_text(CODE)
    done = subprocess.run(
        [sys.executable, code, plain, out / "plain", odd, out / "odd"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, after = (int(line) * 1024 for line in done.stdout.split())
    return out / "odd", after - before


@pytest.fixture(scope="module")
def examples(prepared):
    records = Records(prepared[0], "all")
    parsed = (records.parse(record) for record in records.read(np.arange(len(records))))
    return {row["id"].numpy().decode(): {name: value.numpy() for name, value in row.items()} for row in parsed}


@pytest.mark.slow
def test_unreadable_pictures_are_counted_and_all_others_kept(prepared, examples):
    metadata = builder.metadata(prepared[0])
    assert metadata["dropped"] == {
        "image over 50000000 pixels": 1,
        "image empty": 1,
        "not an image": 1,
        "image truncated": 1,
    }
    kept = "plain cmyk palette animated moving rotated sixteen transparent large"
    assert set(examples) == set(kept.split())


@pytest.mark.slow
def test_kept_pictures_are_stored_upright_in_eight_bits_and_described_correctly(examples):
    for name, values in examples.items():
        with Image.open(BytesIO(values["image"])) as image:
            assert image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L"), name
            assert image.size == ((7000, 7000) if name == "large" else (WIDTH, HEIGHT)), name
        if name == "large":
            continue
        pixels = values["boxes"][0] * [WIDTH, HEIGHT, WIDTH, HEIGHT]
        np.testing.assert_allclose(pixels, BOX, atol=3, err_msg=name)
        colour = values["colour_names"][0].decode()
        assert colour == ("Grey" if name == "sixteen" else "Red"), name


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_allowed_picture(prepared):
    allowed = 7000 * 7000 * 3
    assert prepared[1] < 4 * allowed, f"{prepared[1] / 2**20:.0f} MiB more than for ordinary pictures"
