"""What readers share: checks of fixed layouts, texts of files, and articles made of their photos."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jaxclip.catalog.product import Oddity, Product
from jaxclip.errors import UserError

PHOTO_ATTRIBUTES = ("view",)
"""Attributes of a photo, which its article does not have."""


def check(path: Path, columns: Mapping[str, str], required: Iterable[str], *, dataset: str, source: str) -> None:
    """Checks that a folder has the files and folders of a dataset's layout, and that no columns are configured.

    Args:
      path: the folder.
      columns: the reader's `columns`; must be empty, because a fixed layout has fixed columns.
      required: paths relative to the folder; the name of a folder ends in "/".
      dataset: name of the dataset for error messages.
      source: a sentence that says where to fetch the dataset and where to put each file.

    Raises:
      UserError: a path is missing, or `columns` is not empty; the message lists all missing paths and the source.
    """
    if any(columns.values()):
        raise UserError(f"{dataset} has fixed columns: leave --config.data.columns out.")
    missing = [name for name in required if not _exists(path / name, folder=name.endswith("/"))]
    if missing:
        raise UserError(f"{path} is not a copy of {dataset}: it lacks {', '.join(missing)}. {source}")


def collapse(text: str) -> str:
    """Returns the text stripped, with every run of white space replaced by one space."""
    return " ".join(text.split())


def read_text(file: Path) -> str:
    """Returns a text file's content; bytes that are not UTF-8 become surrogates (see `catalog.mend`)."""
    return file.read_text(encoding="utf-8-sig", errors="surrogateescape")


def articles(photos: Iterable[Product | Oddity], counts: Mapping[str, int] | None = None) -> Iterator[Product | Oddity]:
    """Yields the photos of each group as one product, and each oddity where it occurs.

    The id of such a product is the name of its group. Photos without a group are products of their own. A group without
    any caption is left out, as an oddity. Until an article is yielded, its photos (as paths or places, without their
    pixels) are in memory.

    Args:
      photos: products of one picture each, which may lack captions.
      counts: group -> number of its photos. An article is then yielded after its last photo; without counts, articles
        are yielded at the end, in the order of their first photos.
    """
    open_articles: dict[str, list[Product]] = {}
    for photo in photos:
        if isinstance(photo, Oddity) or not photo.group:
            yield photo
            continue
        article = open_articles.setdefault(photo.group, [])
        article.append(photo)
        if counts and len(article) == counts[photo.group]:
            yield _merged(open_articles.pop(photo.group))
    yield from map(_merged, open_articles.values())


def each_photo(product: Product, names: Sequence[str], group: str) -> Iterator[Product]:
    """Yields each picture of a product as a product of its own, with all captions, in the given group.

    Its id is the product's with the picture's name at the end. A product with one picture is yielded as it is.

    Args:
      product: the product.
      names: the name of each picture.
      group: a name that no other product of the catalogue gives to its group.
    """
    if len(product.pictures) == 1:
        yield product
        return
    for name, picture in zip(names, product.pictures, strict=True):
        yield replace(product, id=product.id + name, pictures=(picture,), group=group)


def _merged(photos: Sequence[Product]) -> Product | Oddity:
    """Returns a product with the pictures and captions of all photos, in order and without repetition.

    Attributes and category are those of the first photo that has them, without PHOTO_ATTRIBUTES.
    """
    article = photos[0].group
    captions = tuple(dict.fromkeys(caption for photo in photos for caption in photo.captions))
    if not captions:
        return Oddity(article, "article without a caption", dropped=True)
    roles = {photo.pictures[0]: photo.roles[0] if photo.roles else "" for photo in reversed(photos)}
    pictures = tuple(dict.fromkeys(photo.pictures[0] for photo in photos))
    attributes: dict[str, str] = {}
    for photo in photos:
        attributes |= {name: value for name, value in photo.attributes.items() if name not in attributes}
    return Product(
        article,
        pictures,
        captions,
        next((photo.category for photo in photos if photo.category), ""),
        {name: value for name, value in attributes.items() if name not in PHOTO_ATTRIBUTES},
        roles=tuple(roles[picture] for picture in pictures) if any(roles.values()) else (),
    )


def _exists(path: Path, *, folder: bool) -> bool:
    return path.is_dir() if folder else path.is_file()
