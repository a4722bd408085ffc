"""Any file becomes a JPEG or PNG picture or a reason why it is unusable."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxclip.catalog.pictures import Picture, inspect


def photo(width=40, height=30):
    ramp = np.add.outer(np.arange(height), np.arange(width))
    return Image.fromarray(np.stack([ramp * 3, 255 - ramp * 2, ramp], -1).astype(np.uint8))


def encode(image, kind, **options):
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def inspected(tmp_path, data, max_pixels=10_000):
    (tmp_path / "picture").write_bytes(data)
    return inspect(tmp_path / "picture", max_pixels)


def decoded(picture):
    image = Image.open(BytesIO(picture.encoded))
    assert image.format in ("JPEG", "PNG")
    assert image.mode in ("RGB", "L")
    assert image.getexif().get(0x0112, 1) == 1
    assert image.size == (picture.width, picture.height)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (photo(), "JPEG", {}),
        (photo(), "JPEG", {"progressive": True, "quality": 90}),
        (photo(), "JPEG", {"restart_marker_blocks": 1}),
        (photo().convert("L"), "JPEG", {}),
        (photo(), "PNG", {}),
        (photo().convert("L"), "PNG", {}),
        (photo(), "JPEG", {"comment": b"short"}),
    ],
)
def test_ordinary_files_keep_their_bytes(tmp_path, image, kind, options):
    data = encode(image, kind, **options)
    picture = inspected(tmp_path, data)
    assert picture.encoded == data
    assert (picture.width, picture.height) == (40, 30)


def with_orientation(value, **more):
    exif = Image.Exif()
    exif[0x0112] = value
    return {"exif": exif, **more}


@pytest.mark.parametrize(
    ("image", "kind", "options", "tolerance"),
    [
        (photo(), "WEBP", {"lossless": True}, 0),
        (photo(), "BMP", {}, 0),
        (photo(), "TIFF", {}, 0),
        (photo(), "PPM", {}, 0),
        (photo().convert("CMYK"), "JPEG", {"quality": 100}, 40),
        (photo().quantize(64), "PNG", {}, 40),
        (photo().quantize(64), "GIF", {}, 40),
        (photo().convert("RGBA"), "PNG", {}, 0),
    ],
)
def test_other_formats_become_png_with_the_same_pixels(tmp_path, image, kind, options, tolerance):
    picture = inspected(tmp_path, encode(image, kind, **options))
    assert picture.encoded.startswith(b"\x89PNG")
    assert np.abs(decoded(picture).astype(int) - np.asarray(photo()).astype(int)).max() <= tolerance


@pytest.mark.parametrize("orientation", range(2, 9))
def test_rotation_by_exif_is_applied(tmp_path, orientation):
    turned = inspected(tmp_path, encode(photo(), "PNG", **with_orientation(orientation)))
    plain = np.asarray(photo())
    expected = {
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: plain.transpose(1, 0, 2)[:, ::-1],
        7: plain[::-1, ::-1].transpose(1, 0, 2),
        8: plain.transpose(1, 0, 2)[::-1],
    }[orientation]
    np.testing.assert_array_equal(decoded(turned), expected)
    assert (turned.width, turned.height) == expected.shape[1::-1]
    assert inspected(tmp_path, encode(photo(), "JPEG", **with_orientation(orientation))).encoded[:4] == b"\x89PNG"


def test_alpha_is_composited_over_white(tmp_path):
    image = photo().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True)):
        assert decoded(inspected(tmp_path, data)).min() == 255
    keyed = encode(Image.new("RGB", (8, 8), "red"), "PNG", transparency=(255, 0, 0))
    assert decoded(inspected(tmp_path, keyed)).min() == 255
    gif = encode(Image.new("P", (8, 8), 0), "GIF", transparency=0)
    assert decoded(inspected(tmp_path, gif)).min() == 255


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for kind in ("PNG", "TIFF"):
        pixels = decoded(inspected(tmp_path, encode(Image.fromarray(values), kind)))
        np.testing.assert_allclose(pixels[..., 0], values / 257, atol=1)
    floats = encode(Image.fromarray((values / 65535).astype(np.float32)), "TIFF")
    np.testing.assert_allclose(decoded(inspected(tmp_path, floats))[..., 0], values / 257, atol=1)


def test_sixteen_bit_rgb_png_is_stored_with_eight_bits(tmp_path):
    rows = b"".join(b"\0" + b"\x80\x01\x40\x02\x20\x03" * 4 for _ in range(4))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    picture = inspected(tmp_path, data)
    assert picture.encoded[24] == 8
    np.testing.assert_allclose(decoded(picture), np.broadcast_to([0x80, 0x40, 0x20], (4, 4, 3)), atol=1)


def test_the_first_frame_of_an_animation_is_stored(tmp_path):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True}))
        assert tuple(decoded(inspected(tmp_path, data))[0, 0]) == (255, 0, 0), kind


@pytest.mark.parametrize("progressive", [False, True])
def test_large_metadata_is_stripped_without_changing_pixels(tmp_path, progressive):
    plain = encode(photo(), "JPEG", quality=80, progressive=progressive)
    heavy = encode(
        photo(), "JPEG", quality=80, progressive=progressive, icc_profile=b"i" * 70_000, exif=b"Exif\0\0" + b"e" * 9000
    )
    trailing = plain + b"a second picture" * 1000
    for data in (heavy, trailing):
        picture = inspected(tmp_path, data)
        assert picture.encoded == plain
        assert picture.pixels == inspected(tmp_path, plain).pixels
    png = inspected(tmp_path, encode(photo(), "PNG", icc_profile=os.urandom(9000)))
    assert len(png.encoded) < 4000
    np.testing.assert_array_equal(decoded(png), np.asarray(photo()))


def test_a_png_with_a_wrong_checksum_that_pillow_ignores_is_encoded_again(tmp_path):
    data = encode(photo(), "PNG")
    picture = inspected(tmp_path, data[:-1] + bytes([data[-1] ^ 1]))
    assert picture.encoded[-4:] == data[-4:]
    np.testing.assert_array_equal(decoded(picture), np.asarray(photo()))


def test_the_pixel_hash_depends_on_pixels_and_size_not_encoding(tmp_path):
    grey = photo().convert("L")
    same = [encode(grey, "PNG"), encode(grey.convert("RGB"), "PNG"), encode(grey, "BMP"), encode(grey, "TIFF")]
    assert len({inspected(tmp_path, data).pixels for data in same}) == 1
    flat = [encode(Image.new("RGB", size), "PNG") for size in ((6, 4), (4, 6), (24, 1))]
    assert len({inspected(tmp_path, data).pixels for data in flat}) == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_truncated_file_is_reported(tmp_path, kind, share):
    data = encode(photo(200, 150), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    assert inspected(tmp_path, data[: int(len(data) * share)], 100_000) == "image truncated"


def test_a_truncated_progressive_jpeg_is_reported(tmp_path):
    data = encode(photo(200, 150), "JPEG", progressive=True, quality=95)
    assert inspected(tmp_path, data[:-200], 100_000) == "image truncated"


def test_other_reasons(tmp_path):
    assert inspect(tmp_path / "nothing.jpg") == "image missing"
    assert inspect(tmp_path) == "image missing"
    assert inspect(tmp_path / ("x" * 5000)) in ("image missing", "image unreadable")
    assert inspected(tmp_path, b"") == "image empty"
    assert inspected(tmp_path, b"<html>404</html>") == "not an image"
    assert inspected(tmp_path, encode(photo(101, 100), "PNG")) == "image over 10000 pixels"
    assert isinstance(inspected(tmp_path, encode(photo(100, 100), "PNG")), Picture)
    assert inspected(tmp_path, b"\0" * (2**20 + 81_000)) == f"image file over {2**20 + 80_000} bytes"


def test_a_decompression_bomb_is_rejected_by_its_header(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT" + b"\0" * 8
    assert inspected(tmp_path, bomb) == "image over 10000 pixels"


ORIGINALS = [
    encode(photo(), "JPEG", **with_orientation(6, progressive=True)),
    encode(photo(), "PNG", **with_orientation(3)),
    encode(photo(), "WEBP"),
    encode(photo().quantize(16), "GIF"),
    encode(photo(), "TIFF", compression="tiff_adobe_deflate"),
    encode(photo(), "BMP"),
    encode(photo().quantize(16), "PNG", transparency=3),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(ORIGINALS),
    st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), max_size=8),
    st.integers(0, 5000),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_a_picture_or_a_reason(tmp_path, data, damage, cut):
    damaged = bytearray(data)
    for position, patch in damage:
        position %= len(damaged)
        damaged[position : position + len(patch)] = patch
    result = inspected(tmp_path, bytes(damaged[: max(cut, 1)]))
    if isinstance(result, Picture):
        decoded(result)
    else:
        assert result in ("not an image", "image truncated", "image over 10000 pixels")


@pytest.mark.skipif("JAXCLIP_REAL_DATA" not in os.environ, reason="JAXCLIP_REAL_DATA is not set")
def test_real_photos_keep_their_bytes_except_for_large_metadata():
    folder = Path(os.environ["JAXCLIP_REAL_DATA"]) / "fashion-products" / "images"
    files = sorted(folder.iterdir())[::6]
    stripped = 0
    for file in files:
        picture = inspect(file)
        assert isinstance(picture, Picture), (file, picture)
        assert len(picture.encoded) <= file.stat().st_size
        stripped += picture.encoded != file.read_bytes()
        np.testing.assert_array_equal(decoded(picture), np.asarray(Image.open(file).convert("RGB")))
    assert 0 < stripped < len(files) / 50
