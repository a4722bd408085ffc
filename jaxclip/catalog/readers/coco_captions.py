"""COCO Captions (Chen et al. 2015): about five captions per photo."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import flickr30k, layout
from jaxclip.errors import UserError

SOURCE = (
    "Fetch it from https://cocodataset.org/#download and put annotations/captions_*.json (or dataset_coco.json, "
    "Karpathy's split) and the folders of photos, such as train2017/ and val2017/, into it."
)


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the photos in the order of the caption files, with all their captions, and each oddity where it occurs.

    The attribute `partition` is the end of the caption file's name: `val2017` for `captions_val2017.json`. Photos are
    in the folder of that name, or in `images/` if that folder does not exist. If `dataset_coco.json` exists, it is read
    instead of the caption files, and its own splits become `partition` (see `flickr30k.read_karpathy`).

    Raises:
      UserError: there are no caption files, a caption file is malformed, or `columns` is not empty.
    """
    layout.check(path, columns, ["./"], dataset="COCO Captions", source=SOURCE)
    if (path / "dataset_coco.json").is_file():
        yield from flickr30k.read_karpathy(path / "dataset_coco.json", path)
        return
    files = sorted(path.glob("annotations/captions_*.json"))
    if not files:
        raise UserError(f"{path} is not a copy of COCO Captions: it lacks annotations/captions_*.json. {SOURCE}")
    for file in files:
        yield from _photos(file, path)


def _photos(file: Path, path: Path) -> Iterator[Product | Oddity]:
    partition = file.stem.removeprefix("captions_")
    images = path / partition if (path / partition).is_dir() else path / "images"
    sentences: dict[int, list[str]] = {}
    try:
        content = json.loads(layout.read_text(file))
        for annotation in content["annotations"]:
            sentences.setdefault(annotation["image_id"], []).append(layout.collapse(annotation["caption"]))
        photos = [(photo["id"], photo["file_name"]) for photo in content["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{file} should hold {{"images": [{{"id", "file_name"}}], "annotations": [{{"image_id", "caption"}}]}}: '
            f"{type(error).__name__}: {error}."
        ) from error
    for number, name in photos:
        captions = tuple(dict.fromkeys(filter(None, sentences.get(number, []))))
        if captions:
            yield Product(Path(name).stem, (images / name,), captions, attributes={"partition": partition})
        else:
            yield Oddity(f"{file.name}: {name}", "photo without a caption", dropped=True)
