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
MIN_LINE_LENGTH = 3  # characters; shorter lines of a description are left out, as they carry no information


def read(path: Path, columns: Mapping[str, str]) -> Iterator[Product | Oddity]:
    """Yields the photos in the order of the partition list, and each oddity where it occurs.

    The caption is the article's description with its lines joined; different descriptions are several captions. The
    category is the folder above the article, such as Dresses in `img/WOMEN/Dresses/id_00000002/02_1_front.jpg`. Photos
    of one article are one group. Attributes: gender, view, colours (all colours of the article, joined by commas) and
    `partition` (train, query or gallery).

    Raises:
      UserError: a file is missing or malformed, no photo has a description, or `columns` is not empty.
    """
    required = [DESCRIPTIONS, PARTITION]
    layout.check(path, columns, required, dataset="the DeepFashion In-shop dataset", source=SOURCE)
    images = next((folder for folder in (path / "img", path / "Img" / "img") if folder.is_dir()), None)
    if images is None:
        raise UserError(f"{path} is not a copy of the DeepFashion In-shop dataset: it lacks img/. {SOURCE}")
    described = _descriptions(path / DESCRIPTIONS)
    empty = True
    for number, line in enumerate((path / PARTITION).read_text(encoding="utf-8").splitlines(), start=1):
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
        attributes = {"partition": partition, "view": photo_path.stem.rpartition("_")[2]}
        attributes |= {"gender": gender} if gender else {}
        attributes |= {"colours": ", ".join(colours)} if colours else {}
        empty = False
        id_ = photo_path.with_suffix("").as_posix()
        yield Product(id_, images / photo_path, tuple(texts), category.replace("_", " "), attributes, item)
    if empty:
        raise UserError(f"{path / PARTITION} lists no photo that has a description: give the whole dataset")


def _descriptions(file: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Returns article -> (descriptions, colours), without duplicates, in file order."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
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
