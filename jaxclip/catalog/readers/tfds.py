"""Any dataset prepared by TFDS; images and texts are recognised by the names of its features, unless configured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxclip.catalog.product import Oddity, Product
from jaxclip.catalog.readers import layout
from jaxclip.errors import UserError

USUAL_NAMES = {
    "id": ("id", "image_id", "image/id", "image/filename", "filename", "file_name"),
    "image": ("image", "images"),
    "caption": ("caption", "captions", "text", "title", "description"),
    "category": ("category", "label", "class"),
}
"""Role -> the feature names by which it is recognised, the first that exists; a slash precedes a nested name."""


@dataclass(frozen=True)
class TFDSImage:
    """Picture `number` of one example, the one at index `row` of a split of the dataset in `folder`."""

    folder: Path
    split: str
    row: int
    feature: str
    size: int
    number: int = 0

    def read(self) -> bytes:
        """Returns the encoded picture as stored."""
        example = _source(self.folder, self.split, self.feature)[self.row]
        return _pictures(_values(example, self.feature))[self.number]

    def __str__(self) -> str:
        location = f"{self.folder.parent.name}: {self.split}[{self.row}]"
        return f"{location}, picture {self.number + 1}" if self.number else location


def read(path: Path, columns: Mapping[str, str], unit: str = "article") -> Iterator[Product | Oddity]:
    """Yields the examples of all splits, in stored order, and each oddity where it occurs.

    `path` is the folder of `dataset_info.json`, for example `DATA_DIR/flickr30k/1.0.0`. Only ArrayRecord is supported,
    because other formats have no random access. If the image is a sequence, the example is a product with several
    pictures. Features other than id, image and caption that are text, class labels or whole numbers become attributes;
    the split's name becomes the attribute `partition`. Without an id, an example has the id SPLIT-ROW.

    With `unit` = "photo", each picture is a product. Those of one example have the same captions, are one group, and
    have their numbers at the end of their ids, such as ID-1.

    Raises:
      UserError: there is no prepared dataset, it is not stored as ArrayRecord, a configured feature does not exist, or
        no feature fits the image or caption, or `columns` has a product column.
    """
    import tensorflow_datasets as tfds  # takes seconds to import and is needed by this reader only

    if columns.get("product"):
        raise UserError("an example of a TFDS dataset is one product: leave --config.data.columns.product out.")
    if not (path / "dataset_info.json").is_file():
        raise UserError(
            f"{path} is not a prepared TFDS dataset: it lacks dataset_info.json. Give the folder DATA_DIR/NAME/VERSION."
        )
    builder = tfds.builder_from_directory(path)
    if not _random_access(builder):
        raise UserError(
            f"{path} is stored as {builder.info.file_format.value}: "
            "prepare the dataset again with file_format='array_record'."
        )
    features = {"/".join(names): feature for names, feature in _flatten(builder.info.features)}
    roles = _roles(path, features, columns)
    attribute_features = {
        name: f for name, f in features.items() if name not in (roles["image"], roles["caption"], roles.get("id"))
    }
    for split in builder.info.splits:
        for row, example in enumerate(_source(path, split, roles["image"])):
            location = f"{path.parent.name}: {split}[{row}]"
            captions = _captions(_values(example, roles["caption"]))
            encoded = _pictures(_values(example, roles["image"]))
            if not captions or not encoded:
                missing = "picture" if captions else "caption"
                yield Oddity(location, f"example without a {missing}", dropped=True)
                continue
            attributes = {
                name: text for name, f in attribute_features.items() if (text := _text(_values(example, name), f))
            }
            id_ = _id(_values(example, roles["id"]), features[roles["id"]]) if "id" in roles else ""
            category = attributes.get(roles.get("category", ""), "")
            pictures = tuple(
                TFDSImage(path, split, row, roles["image"], len(picture), n) for n, picture in enumerate(encoded)
            )
            product = Product(id_ or f"{split}-{row}", pictures, captions, category, {**attributes, "partition": split})
            names = [f"-{n}" for n in range(1, len(pictures) + 1)]
            yield from layout.each_photo(product, names, f"{split}-{row}") if unit == "photo" else [product]


@lru_cache(maxsize=8)
def _source(folder: Path, split: str, image: str) -> Any:
    """Returns the examples of a split by index, with the feature `image` still encoded.

    Results are cached, because opening a split is slow.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)

    class Encoded(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, serialized_example: Any) -> Any:  # TFDS lacks it for sequences
            return serialized_example

    decoders: Any = Encoded()
    for name in reversed(image.split("/")):
        decoders = {name: decoders}
    return builder.as_data_source(split, decoders=decoders)


def _random_access(builder: Any) -> bool:
    return builder.info.file_format.value == "array_record"


def _flatten(features: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, feature in features.items():
        if hasattr(feature, "items"):
            yield from _flatten(feature, (*names, name))
        else:
            yield (*names, name), feature


def _roles(path: Path, features: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    roles = {}
    for role, usual in USUAL_NAMES.items():
        configured = columns.get(role)
        if configured and configured not in features:
            raise UserError(
                f"{path} has no feature {configured} (--config.data.columns.{role}): it has {', '.join(features)}."
            )
        name = configured or next((name for name in usual if name in features), "")
        if name:
            roles[role] = name
        elif role in ("image", "caption"):
            raise UserError(
                f"{path} has no feature that looks like the {role}: it has {', '.join(features)}; "
                f"name the feature with --config.data.columns.{role}=NAME."
            )
    return roles


def _values(example: Any, name: str) -> Any:
    for part in name.split("/"):
        example = example[part]
    return example


def _pictures(value: Any) -> list[bytes]:
    """Returns the encoded pictures of an image, or of a sequence of images."""
    return [value] if isinstance(value, bytes) else [bytes(picture) for picture in value]


def _captions(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, bytes | str) else list(value)
    return tuple(dict.fromkeys(filter(None, map(layout.collapse, map(_decode, values)))))


def _decode(value: Any) -> str:
    return value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)


def _id(value: Any, feature: Any) -> str:
    """Returns a text as it is, or the name of a class label or whole number; "" if it is blank or another value."""
    text = _decode(value) if isinstance(value, bytes | str) else _text(value, feature)
    return text if text.strip() else ""


def _text(value: Any, feature: Any) -> str:
    """Returns a text, class label or whole number as text, and "" for any other value."""
    if isinstance(value, bytes | str):
        return " ".join(_captions(value))
    if isinstance(value, int | np.integer):
        return feature.int2str(int(value)).replace("_", " ") if hasattr(feature, "int2str") else str(value)
    return ""
