"""Flickr30k (Young et al. 2014): five captions per photo."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.errors import UserError

SOURCE = (
    "Fetch it from https://shannon.cs.illinois.edu/DenotationGraph/ and put the photos (as flickr30k-images/ or "
    "images/) and one of dataset_flickr30k.json (Karpathy's split), results_20130124.token or results.csv into it."
)
FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the photos in the order of the caption file, with all their captions, and each oddity where it occurs.

    `dataset_flickr30k.json` is preferred, because only it has the attribute `partition` (train, val or test).

    Raises:
      UserError: photos or captions are missing, the caption file is malformed, or `columns` is not empty.
    """
    layout.check(path, columns, ["./"], dataset="Flickr30k", source=SOURCE)
    images = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    karpathy, token, table = (path / n for n in ("dataset_flickr30k.json", "results_20130124.token", "results.csv"))
    if images is None or not (karpathy.is_file() or token.is_file() or table.is_file()):
        raise UserError(
            f"{path} is not a copy of Flickr30k: it lacks {'the captions' if images else 'the photos'}. {SOURCE}"
        )
    if karpathy.is_file():
        yield from read_karpathy(karpathy, images)
    else:
        yield from _read_lines(token if token.is_file() else table, images)


def read_karpathy(file: Path, images: Path) -> Iterator[Product | Oddity]:
    """Yields the photos of a caption file in Karpathy's format, in file order, and each oddity where it occurs.

    The format is {"images": [{"filepath", "filename", "sentences": [{"raw"}], "split"}]}, where "filepath", a folder in
    `images`, and "split", which becomes the attribute `partition`, may be missing.

    Raises:
      UserError: the file is malformed.
    """
    try:
        entries = json.loads(layout.read_text(file))["images"]
        rows = [
            (
                entry.get("filepath", ""),
                entry["filename"],
                entry.get("split", ""),
                [s["raw"] for s in entry["sentences"]],
            )
            for entry in entries
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file} should hold {{"images": [{{"filename", "sentences": [{{"raw"}}]}}]}}: '
            f"{type(error).__name__}: {error}."
        ) from error
    for folder, name, partition, sentences in rows:
        captions = tuple(dict.fromkeys(filter(None, map(layout.collapse, sentences))))
        if not captions:
            yield Oddity(f"{file.name}: {name}", "photo without a caption", dropped=True)
            continue
        yield Product(
            Path(name).stem,
            (images / folder / name,),
            captions,
            attributes={"partition": partition} if partition else {},
        )


def _read_lines(file: Path, images: Path) -> Iterator[Product | Oddity]:
    captions: dict[str, list[str]] = {}
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith("image"):
                continue
            if file.suffix == ".token":  # NAME.jpg#NUMBER<tab>SENTENCE
                photo, _, text = line.partition("\t")
                name = photo.rpartition("#")[0]
            else:  # NAME.jpg| NUMBER| SENTENCE
                name, _, text = (line.split("|", 2) + ["", ""])[:3]
            name, text = name.strip(), layout.collapse(text)
            if name and text:
                captions.setdefault(name, []).append(text)
            elif line.strip():
                yield Oddity(f"{file.name}:{number}", "row without a photo and a sentence", dropped=True)
    if not captions:
        raise UserError(f"{file} has no captions: each row should have a photo's name and a sentence.")
    for name, sentences in captions.items():
        yield Product(Path(name).stem, (images / name,), tuple(dict.fromkeys(sentences)))
