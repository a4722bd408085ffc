"""The TFDS builder of the prepared dataset, and the conversion of products to its examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxclip.catalog.describe import TEXT, Column
from jaxclip.catalog.product import Product, picture_name

NAME, VERSION = "catalogue", "2.0.0"
SOURCE = "source"
COMPACT = (",", ":")
"""Separators of the shortest JSON."""
OUTDATED = ("1.0.0",)
"""Versions of the format that earlier versions of the program wrote, and that this one does not read."""


class CatalogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes products with their pictures, texts, group and described values.

    `pictures` is a JSON list with the name of each picture, or [name, role] if pictures have roles; `attributes` is a
    JSON object; SOURCE, the name of the catalogue that the product is from, exists only in datasets of several
    catalogues.
    """

    name = NAME
    VERSION = tfds.core.Version(VERSION)
    # Nothing is downloaded, so there are no checksums. With a code_path, TFDS 4.9.10 would look for them through
    # importlib_resources, which is not among its declared dependencies.
    code_path = None

    def __init__(
        self, examples: Mapping[str, Any], columns: Mapping[str, Column], facts: dict[str, Any], data_dir: Path
    ):
        """Stores the builder's arguments.

        Args:
          examples: split -> an iterator over results of `example`, or a Beam transform that yields them.
          columns: the describer's columns by name; empty without a describer.
          facts: facts about the dataset, stored as its TFDS metadata.
          data_dir: folder of the dataset.
        """
        self._examples, self._columns, self._facts = examples, columns, facts
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3))),
            "pictures": tfds.features.Text(),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "category": tfds.features.Text(),
            "attributes": tfds.features.Text(),
            "group": tfds.features.Scalar(np.int64),
        } | {name: _feature(column) for name, column in self._columns.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Products prepared for text-to-image retrieval.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self._facts),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._examples}

    def _generate_examples(self, split: str) -> Any:
        return self._examples[split]


@dataclass(frozen=True)
class Label:
    """What is known of a product only when all products are known.

    Attributes:
      number: its number among the kept products, in the reader's order; TFDS orders the dataset by the number's hash.
      id: its id, which no other product has.
      group: its group, an integer.
    """

    number: int
    id: str
    group: int


def example(
    product: Product, label: Label, pictures: Sequence[bytes], description: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Returns the key by whose hash TFDS orders the dataset, and the example."""
    names: list = [picture_name(location) for location in product.pictures]
    names = list(zip(names, product.roles, strict=True)) if any(product.roles) else names
    return str(label.number), {
        "id": label.id,
        "images": list(pictures),
        "pictures": json.dumps(names, separators=COMPACT),  # ASCII, as file names need not be UTF-8
        "captions": list(product.captions),
        "category": product.category,
        "attributes": json.dumps(dict(product.attributes), ensure_ascii=False, separators=COMPACT),
        "group": label.group,
        **({SOURCE: product.source} if product.source else {}),
        **description,
    }


def _feature(column: Column) -> tfds.features.FeatureConnector:
    if column.dtype != TEXT:
        return tfds.features.Tensor(shape=column.shape, dtype=np.dtype(column.dtype))
    return tfds.features.Sequence(tfds.features.Text()) if column.shape else tfds.features.Text()
