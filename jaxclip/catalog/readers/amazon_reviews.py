"""Amazon Review Data 2018 (Ni et al. 2019): metadata and reviews as gzipped JSON lines, photos in a folder."""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.catalog.readers.folder import SUFFIXES
from jaxclip.errors import UserError

SOURCE = (
    "Fetch meta_CATEGORY.json.gz (and CATEGORY.json.gz with the reviews) from "
    "https://nijianmo.github.io/amazon/, fetch the photos at imageURLHighRes or imageURL, and put them into images/ "
    "under their URL's file name or as ASIN.jpg."
)
URLS = ("imageURLHighRes", "imageURL", "imUrl")
_TAG = re.compile(r"<[^>]*>")
_NUMBERED = re.compile(r"(?P<asin>[A-Za-z0-9]+)[_-](?P<number>[0-9]{1,4})")
MAX_TITLE_LENGTH = 1000  # characters; longer titles are taken for web pages that were scraped by mistake


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the products of all `meta_*.json.gz`, sorted by name, in file order, and each oddity where it occurs.

    The caption is the title. A product's photos are those in `images/` or below under the file names of its URLs, in
    their order, each photo once, in the first size that is found. If none is found, they are named after its ASIN:
    `ASIN.jpg`, then `ASIN_1.jpg`, `ASIN-2.jpg` and so on by their numbers. If there is none of these either, the
    product is later dropped for its missing image. With `unit` = "photo", a product has the first of these photos only:
    one photo a product.

    Attributes: brand and, if the file of reviews has any for the product, their number and mean rating. The category is
    the deepest non-empty one of the first three levels of the product's category list. An ASIN is one product: later
    entries of it are dropped.

    Raises:
      UserError: the metadata or `images/` is missing, no product has a title, or `columns` is not empty.
    """
    layout.check(path, columns, ["images/"], dataset="Amazon Review Data", source=SOURCE)
    tables = sorted(path.glob("meta_*.json.gz"))
    if not tables:
        raise UserError(f"{path} is not a copy of Amazon Review Data: it lacks meta_*.json.gz. {SOURCE}")
    photos = {file.name: file for file in (path / "images").rglob("*") if file.suffix.lower() in SUFFIXES}
    numbered = _numbered(photos.values())
    limit = 1 if unit == "photo" else None
    seen: set[str] = set()
    for table in tables:
        ratings: dict[str, tuple[int, float]] = {}
        reviews = table.with_name(table.name.removeprefix("meta_"))
        if reviews.is_file():
            yield from _read_ratings(reviews, ratings)
        for location, entry in _lines(table):
            if isinstance(entry, str):
                yield Oddity(location, entry, dropped=True)
                continue
            asin, title = str(entry.get("asin") or ""), _text(entry.get("title"))
            problem = _find_problem(asin, title, seen)
            if problem:
                yield Oddity(f"{location} {asin}".rstrip(), problem, dropped=True)
                continue
            seen.add(asin)
            pictures = tuple(itertools.islice(_by_url(entry, photos), limit))
            pictures = pictures or tuple(_by_asin(asin, photos, numbered)[:limit])
            yield Product(
                asin,
                pictures or (path / "images" / f"{asin}.jpg",),
                (title,),
                _category(entry),
                _review_attributes(entry, ratings, asin),
            )
    if not seen:
        raise UserError(f"{path} has no product with a title in meta_*.json.gz: give the complete metadata")


def _find_problem(asin: str, title: str, seen: set[str]) -> str:
    if not asin:
        return "product without an ASIN"
    if asin in seen:
        return "duplicate ASIN"
    if not title:
        return "product without a title"
    return "title too long to be a name" if len(title) > MAX_TITLE_LENGTH else ""


def _read_ratings(reviews: Path, ratings: dict[str, tuple[int, float]]) -> Iterator[Oddity]:
    """Adds each review to its product's (number of reviews, sum of ratings); yields an oddity per malformed line."""
    for location, entry in _lines(reviews):
        if isinstance(entry, str):
            yield Oddity(location, entry, dropped=False)
        elif "asin" in entry and isinstance(entry.get("overall"), int | float):
            count, total = ratings.get(entry["asin"], (0, 0.0))
            ratings[entry["asin"]] = (count + 1, total + entry["overall"])


def _lines(file: Path) -> Iterator[tuple[str, dict | str]]:
    """Yields (file:line, JSON object) per line; the name of the problem replaces a malformed object."""
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                yield f"{file.name}:{number}", entry if isinstance(entry, dict) else "line is not a JSON object"
    except (EOFError, gzip.BadGzipFile, zlib.error):
        yield f"{file.name}:{number + 1}", "file is truncated or damaged from here on"


def _by_url(entry: Mapping, photos: Mapping[str, Path]) -> Iterator[Path]:
    """Yields the files named by the URLs of an entry; NAME._SIZE_.jpg and NAME.jpg are one photo."""
    found: set[str] = set()
    for field in URLS:
        urls = entry.get(field) or []
        for url in [urls] if isinstance(urls, str) else urls:
            name = unquote(Path(urlsplit(str(url)).path).name)
            photo = name.partition(".")[0]
            if name in photos and photo not in found:
                found.add(photo)
                yield photos[name]


def _by_asin(asin: str, photos: Mapping[str, Path], numbered: Mapping[str, Sequence[Path]]) -> list[Path]:
    named = [photos[asin + suffix] for suffix in SUFFIXES if asin + suffix in photos]
    return [*named[:1], *numbered.get(asin, ())]


def _numbered(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Returns ASIN -> its files such as ASIN_1.jpg or ASIN-2.jpg, by their numbers."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.stem):
            found.setdefault(match["asin"], []).append((int(match["number"]), file))
    return {asin: [file for _, file in sorted(group)] for asin, group in found.items()}


def _category(entry: Mapping) -> str:
    names = entry.get("category") or entry.get("categories") or []
    while names and isinstance(names[0], list):
        names = names[0]
    # Below the third level, the list contains sentences of the description.
    levels = [_text(name) for name in names[:3]] if isinstance(names, list) else [_text(names)]
    return next((name for name in reversed(levels) if name), "")


def _review_attributes(entry: Mapping, ratings: Mapping[str, tuple[int, float]], asin: str) -> dict[str, str]:
    brand = _text(entry.get("brand"))
    attributes = {"brand": brand} if brand else {}
    if asin in ratings:
        count, total = ratings[asin]
        attributes |= {"reviews": str(count), "rating": f"{total / count:.2f}"}
    return attributes


def _text(value: object) -> str:
    return layout.collapse(_TAG.sub(" ", unescape(value))) if isinstance(value, str) else ""
