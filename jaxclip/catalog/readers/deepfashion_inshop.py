"""DeepFashion In-shop Clothes Retrieval (Liu et al. 2016): several photos and a description per article."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.errors import UserError

SOURCE = (
    "Fetch the In-shop Clothes Retrieval Benchmark from https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html and put "
    "Anno/list_description_inshop.json, Eval/list_eval_partition.txt and the unpacked img.zip (as img/ or Img/img/) "
    "into it."
)
DESCRIPTIONS, PARTITION = "Anno/list_description_inshop.json", "Eval/list_eval_partition.txt"
ROLES = ("query", "gallery")
MIN_LINE_LENGTH = 3  # characters; shorter lines of a description are left out, as they carry no information


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the articles with all their photos, and the oddities before them.

    Articles are in the order of their first photos in the partition list; an article's id is the list's own, such as
    id_00000002. The caption is the description with its lines joined; different descriptions are several captions. The
    category is the folder above the article, such as Dresses in `img/WOMEN/Dresses/id_00000002/02_1_front.jpg`.
    Attributes: gender, colours (all colours of the article, joined by commas) and `partition` (train, or test for the
    articles of the benchmark's queries and gallery). `roles` says which photos the benchmark takes as queries and which
    as gallery.

    With `unit` = "photo", each photo is a product in the order of the list, the photos of an article are one group,
    `view` is an attribute, and `partition` is train, query or gallery.

    Raises:
      UserError: a file is missing or malformed, no photo has a description, or `columns` is not empty.
    """
    required = [DESCRIPTIONS, PARTITION]
    layout.check(path, columns, required, dataset="the DeepFashion In-shop dataset", source=SOURCE)
    images = next((folder for folder in (path / "img", path / "Img" / "img") if folder.is_dir()), None)
    if images is None:
        raise UserError(f"{path} is not a copy of the DeepFashion In-shop dataset: it lacks img/. {SOURCE}")
    photos = _photos(path / PARTITION, images, _descriptions(path / DESCRIPTIONS), unit)
    yield from photos if unit == "photo" else layout.articles(photos)


def _photos(
    file: Path, images: Path, described: Mapping[str, tuple[list[str], list[str]]], unit: str
) -> Iterator[Product | Oddity]:
    """Yields the photos in a partition list; `described` is article -> (descriptions, colours)."""
    empty = True
    for number, line in enumerate(layout.read_text(file).splitlines(), start=1):
        fields = line.split()
        if number <= 2 or not fields:  # the first two lines are the number of photos and the header
            continue
        location = f"{PARTITION}:{number}"
        if len(fields) != 3 or not fields[0].startswith("img/"):
            yield Oddity(location, "row is not a photo, an article and a partition", dropped=True)
            continue
        photo, item, partition = fields
        texts, colours = described.get(item, ([], []))
        if not texts:
            yield Oddity(location, "article without a description", dropped=True)
            continue
        photo_path = Path(photo).relative_to("img")
        gender, category = (photo_path.parts[0], photo_path.parts[1]) if len(photo_path.parts) > 3 else ("", "")
        role = partition if partition in ROLES else ""
        attributes = {"partition": "test" if role and unit == "article" else partition}
        attributes["view"] = photo_path.stem.rpartition("_")[2]
        attributes |= {"gender": gender} if gender else {}
        attributes |= {"colours": ", ".join(colours)} if colours else {}
        empty = False
        yield Product(
            photo_path.with_suffix("").as_posix(),
            (images / photo_path,),
            tuple(texts),
            category.replace("_", " "),
            attributes,
            item,
            (role,) if role else (),
        )
    if empty:
        raise UserError(f"{file} lists no photo that has a description: give the whole dataset")


def _descriptions(file: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Returns article -> (descriptions, colours), without duplicates, in file order."""
    try:
        entries = json.loads(layout.read_text(file))
        described: dict[str, tuple[list[str], list[str]]] = {}
        for entry in entries:
            texts, colours = described.setdefault(entry["item"], ([], []))
            lines = [layout.collapse(line) for line in entry.get("description", [])]
            text = " ".join(line for line in lines if len(line) >= MIN_LINE_LENGTH)
            if text and text not in texts:
                texts.append(text)
            if entry.get("color") and entry["color"] not in colours:
                colours.append(entry["color"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{file} should be a JSON list of {{"item", "color", "description": [...]}}: '
            f"{type(error).__name__}: {error}."
        ) from error
    return described
