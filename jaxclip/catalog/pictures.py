"""Checks picture files and converts them to the stored format: JPEG or PNG without large metadata."""

import hashlib
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from jaxclip.catalog.product import Embedded

T = TypeVar("T")

MAX_PIXELS = 50_000_000
METADATA_BYTES = 4096
"""Metadata of more than this is stripped entirely: some catalogues have thumbnails of 2 kB with 100 kB of metadata."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8|RIFF....WEBP|II\*\0|MM\0\*|....ftypavi[fs]", re.DOTALL)

# Exceptions that Pillow's plugins raise on broken files, collected by reading their code and by fuzzing.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """A picture ready to be stored.

    Attributes:
      encoded: JPEG or PNG bytes, 8-bit RGB or grayscale, upright.
      width: in pixels.
      height: in pixels.
      pixels: hash of size and RGB pixels; equal pixels have the same hash in any file format.
    """

    encoded: bytes
    width: int
    height: int
    pixels: str


def inspect(image: Path | Embedded, max_pixels: int = MAX_PIXELS) -> Picture | str:
    """Returns the picture in a file or in a part of a file, or the reason why it is unusable.

    Upright 8-bit RGB and grayscale JPEG and PNG files keep their bytes, except for large metadata. Any other picture in
    one of FORMATS (CMYK, palettes, alpha over white, 16 bits, WebP, the first frame of an animation, rotation by EXIF,
    an unusual file structure) becomes an RGB PNG. The reasons are: "image missing", "image unreadable", "image empty",
    "not an image", "image truncated" (or damaged), "image over N pixels", "image file over N bytes".

    Args:
      image: the location of the picture; no file content raises an exception.
      max_pixels: largest number of pixels, by the header, of a picture that is decoded. The largest usable file has 8
        bytes for each of these pixels (uncompressed 16-bit RGBA) and 1 MiB, so memory is bounded. Pillow's own limit,
        twice `Image.MAX_IMAGE_PIXELS`, applies as well.
    """
    limit = 8 * max_pixels + 2**20
    try:
        if not isinstance(image, Path) and image.size > limit:
            return f"image file over {limit} bytes"
        data = _read(image, limit + 1)
    except (FileNotFoundError, ValueError):  # ValueError: a path with a NUL, which names no file
        return "image missing"
    except OSError:
        return "image unreadable"
    if not data:
        return "image empty"
    if len(data) > limit:
        return f"image file over {limit} bytes"
    return _decode(data, max_pixels, partial(_to_picture, data))


def decode(data: bytes, *, max_side: int, max_pixels: int = MAX_PIXELS) -> np.ndarray | str:
    """Returns an encoded picture, upright, as (height, width, 3) uint8, or why it is unusable (see `inspect`).

    Args:
      data: untrusted bytes; no content raises an exception.
      max_side: upper limit of both sides of the result, in pixels; larger pictures are scaled down to it, JPEGs partly
        while they are decoded.
      max_pixels: see `inspect`.
    """
    return _decode(data, max_pixels, partial(_to_pixels, max_side)) if data else "image empty"


def pixels(encoded: bytes, max_side: int) -> np.ndarray:
    """Returns a stored picture as (height, width, 3) uint8, scaled down if a side exceeds `max_side` pixels."""
    with Image.open(BytesIO(encoded), formats=("JPEG", "PNG")) as image:
        image.draft("RGB", (max_side, max_side))  # decodes a much larger JPEG at a fraction of its size
        picture = image.convert("RGB")
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return np.asarray(picture)


def _read(image: Path | Embedded, max_bytes: int) -> bytes:
    if not isinstance(image, Path):
        return image.read()
    if not image.is_file():
        raise FileNotFoundError(image)
    with image.open("rb") as file:
        return file.read(max_bytes)


def _decode(data: bytes, max_pixels: int, convert: Callable[[Image.Image], T]) -> T | str:
    """Returns convert(image), which reads the pixels, or the reason why the picture is unusable."""
    reason = "image truncated" if SIGNATURE.match(data) else "not an image"
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            reason = "image truncated"
            if image.width * image.height > max_pixels:
                return f"image over {max_pixels} pixels"
            return convert(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"image over {max_pixels} pixels"
    except _DECODE_ERRORS:
        return reason


def _to_picture(data: bytes, image: Image.Image) -> Picture:
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    encoded = _original_bytes(data, image) if turn is None else None
    upright = _rgb(image if turn is None else image.transpose(turn))
    return Picture(encoded or _png(upright), upright.width, upright.height, _hash(upright))


def _to_pixels(max_side: int, image: Image.Image) -> np.ndarray:
    turn = _UPRIGHT.get(_orientation(image))
    if max(image.size) > max_side:
        image.draft(None, (max_side, max_side))
    image.load()
    picture = _rgb(image if turn is None else image.transpose(turn))
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.BOX)
    return np.asarray(picture)


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and "xmp" not in image.info and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return 1  # broken metadata is no reason to drop a picture whose pixels can be decoded
    return value if isinstance(value, int) else 1


def _original_bytes(data: bytes, image: Image.Image) -> bytes | None:
    """Returns the file's bytes without large metadata; None if the picture must be encoded again."""
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return None
    if image.format in ("JPEG", "MPO"):
        bare = _bare_jpeg(data)
    elif image.format == "PNG" and data[24] == 8 and not getattr(image, "is_animated", False):
        bare = _bare_png(data)
    else:
        return None
    if bare is None or len(data) - len(bare) <= METADATA_BYTES:
        return None if bare is None else data
    with Image.open(BytesIO(bare), formats=("JPEG", "PNG")) as stripped:
        same = stripped.mode == image.mode and stripped.tobytes() == image.tobytes()
    return bare if same else None


def _bare_jpeg(data: bytes) -> bytes | None:
    """Returns a JPEG without comments, application data and trailing bytes; None if its structure is invalid.

    JFIF (APP0) and Adobe (APP14) segments are kept, because they determine how colours are decoded.
    """
    kept, position = [data[:2]], 2
    while True:
        start = re.compile(rb"\xff+[^\x00\xff]").match(data, position)
        if not start:
            return None
        marker = data[start.end() - 1]
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        if len(data) < start.end() + 2:
            return None
        end = start.end() + int.from_bytes(data[start.end() : start.end() + 2], "big")
        if marker == 0xDA:
            # Entropy-coded data ends at the next marker that is neither a stuffed byte nor a restart.
            following = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]").search(data, end)
            if not following:
                return None
            end = following.start()
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[start.start() : end])
        position = end


def _bare_png(data: bytes) -> bytes | None:
    """Returns a PNG with its header, pixel and end chunks only; None if its structure or a checksum is wrong.

    Pillow ignores some wrong checksums that libpng rejects.
    """
    kept, position = [data[:8]], 8
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return None
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(data[position:end])
        if kind == b"IEND":
            return b"".join(kept)
        position = end
    return None


def _rgb(image: Image.Image) -> Image.Image:
    """Returns an image as 8-bit RGB, with alpha composited over white and higher bit depths scaled down."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    highest = float(values.max(initial=0))
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        # 32-bit modes do not define white; assume the smallest usual range that contains all values.
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        full = next((value for value in ranges if highest <= value), highest)
    return Image.fromarray(np.clip(values * (255.0 / full) + 0.5, 0, 255).astype(np.uint8))


def _png(image: Image.Image) -> bytes:
    plain = Image.frombytes("RGB", image.size, image.tobytes())  # a new image, because a copy would keep the metadata
    buffer = BytesIO()
    plain.save(buffer, "PNG")
    return buffer.getvalue()


def _hash(image: Image.Image) -> str:
    digest = hashlib.blake2b(struct.pack("<II", *image.size), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def mime(picture: bytes) -> str:
    """Returns the media type of a stored picture."""
    return "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
