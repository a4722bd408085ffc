"""A folder of images: subfolders are categories, and an optional `.txt` file next to an image contains its captions."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the images in a folder and its subfolders, and an oddity for every file that is not used.

    The files of a folder come before its subfolders; both are sorted by name. The captions are the non-empty lines of
    the `.txt` file with the image's stem. Without such lines, the caption is the name of the image's folder (see
    `humanise`), so that all images of a class are one group (see `catalog.groups`), or the stem for images at the top.
    The category is the image's folder, relative to `path`; the id is the image's relative path without the suffix, or
    with the suffix if two images differ only in it. Bytes of names that are not UTF-8 are surrogates in both (see
    `catalog.mend`). Hidden files and folders and `__MACOSX` are ignored.

    Raises:
      UserError: `path` is not a folder or has no image, or `columns` is not empty.
    """
    if any(columns.values()):
        raise UserError("a folder of images has no columns: leave --config.data.columns out.")
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give the folder of the images.")
    empty = True
    for folder, files in _walk(path, set()):
        category = "" if folder == path else folder.relative_to(path).as_posix()
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        stems = Counter(image.stem for image in images)
        for file in files:
            location = file.relative_to(path).as_posix()
            if file.suffix.lower() == ".txt":
                if file.stem not in stems:
                    yield Oddity(location, "caption without an image", dropped=True)
            elif file not in images:
                yield Oddity(location, "not an image by its suffix", dropped=True)
            else:
                empty = False
                captions, oddity = _captions(file)
                if oddity:
                    yield Oddity(file.with_suffix(".txt").relative_to(path).as_posix(), oddity, dropped=False)
                if not captions:
                    captions = (humanise(folder.name if category else file.stem),)
                id_ = location if stems[file.stem] > 1 else location.removesuffix(file.suffix)
                yield Product(id_, (file,), captions, category)
    if empty:
        raise UserError(f"{path} has no image: images are files that end in {', '.join(SUFFIXES)}.")


def humanise(name: str) -> str:
    """Returns a name with underscores replaced by spaces and white space collapsed: "long sleeve" for `long_sleeve`."""
    return " ".join(name.replace("_", " ").split()) or name


def _walk(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, list[Path]]]:
    seen.add(folder.resolve())
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX")))
    yield folder, [entry for entry in entries if not entry.is_dir()]
    for entry in entries:
        # Class folders are often symbolic links, so links are followed, but each folder is read only once.
        if entry.is_dir() and entry.resolve() not in seen:
            yield from _walk(entry, seen)


def _captions(image: Path) -> tuple[tuple[str, ...], str]:
    """Returns the captions in an image's `.txt` file, () if there are none, and the kind of oddity, "" for none."""
    try:
        text = image.with_suffix(".txt").read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    except FileNotFoundError:
        return (), ""
    captions = tuple(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))
    if not captions:
        return (), "empty caption file"
    return captions, "broken UTF-8" if "\ufffd" in text else ""
