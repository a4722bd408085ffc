"""The TFDS builder of the prepared dataset, and the conversion of products to its examples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxclip.catalog.describe import TEXT, Column
from jaxclip.catalog.product import Product

NAME, VERSION = "catalogue", "1.0.0"


class CatalogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes products with id, picture, captions, category, attributes (a JSON object), group and described values."""

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
            "image": tfds.features.Image(shape=(None, None, 3)),
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


def example(product: Product, group: int, picture: bytes, description: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the key of a product, by whose hash TFDS orders the dataset, and its example."""
    return product.id, {
        "id": product.id,
        "image": picture,
        "captions": list(product.captions),
        "category": product.category,
        "attributes": json.dumps(dict(product.attributes), ensure_ascii=False),
        "group": group,
        **description,
    }


def _feature(column: Column) -> tfds.features.FeatureConnector:
    if column.dtype != TEXT:
        return tfds.features.Tensor(shape=column.shape, dtype=np.dtype(column.dtype))
    return tfds.features.Sequence(tfds.features.Text()) if column.shape else tfds.features.Text()
