"""Amazon Review Data 2018 (Ni et al. 2019): metadata and reviews as gzipped JSON lines, photos in a folder."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
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
MAX_TITLE_LENGTH = 1000  # characters; longer titles are taken for web pages that were scraped by mistake


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the products of all `meta_*.json.gz`, sorted by name, in file order, and each oddity where it occurs.

    The caption is the title. A product's photo is in `images/` or below, under the file name of one of its URLs (the
    first that is found) or else named after its ASIN; if neither is found, the product is later dropped for its missing
    image. Attributes: brand and, if the file of reviews has any for the product, their number and mean rating. The
    category is the deepest non-empty one of the first three levels of the product's category list.

    Raises:
      UserError: the metadata or `images/` is missing, no product has a title, or `columns` is not empty.
    """
    layout.check(path, columns, ["images/"], dataset="Amazon Review Data", source=SOURCE)
    tables = sorted(path.glob("meta_*.json.gz"))
    if not tables:
        raise UserError(f"{path} is not a copy of Amazon Review Data: it lacks meta_*.json.gz. {SOURCE}")
    photos = {file.name: file for file in (path / "images").rglob("*") if file.suffix.lower() in SUFFIXES}
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
            yield Product(
                asin,
                _photo(entry, asin, photos, path),
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
        with gzip.open(file, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                yield f"{file.name}:{number}", entry if isinstance(entry, dict) else "line is not a JSON object"
    except (EOFError, gzip.BadGzipFile, zlib.error):
        yield f"{file.name}:{number + 1}", "file is truncated or damaged from here on"


def _photo(entry: Mapping, asin: str, photos: Mapping[str, Path], path: Path) -> Path:
    for field in URLS:
        urls = entry.get(field) or []
        for url in [urls] if isinstance(urls, str) else urls:
            name = unquote(Path(urlsplit(str(url)).path).name)
            if name in photos:
                return photos[name]
    return next(
        (photos[asin + suffix] for suffix in SUFFIXES if asin + suffix in photos), path / "images" / f"{asin}.jpg"
    )


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
