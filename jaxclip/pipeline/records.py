"""Random access to the records of a prepared dataset."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from jaxclip.catalog import builder
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.runtime.tensorflow import tf

READ_BLOCK = 1024  # records read at a time
_PRODUCT_FIELDS = {"id", "image", "captions", "category", "attributes", "group"}


class Records:
    """The records of one split ("train", "test" or "all") of a prepared dataset; a record's number is its index from 0.

    Only the first `limit` records are used, all if it is 0; they are a random sample, because a prepared dataset stores
    its records in random order.

    Attributes:
      split: the name of the split, or "all".
      features: the TFDS features of a record.
      numbers: (N,) index of each record within the split; 0..N-1 unless `take` selected a subset.
    """

    def __init__(self, prepared: Path, split: str, limit: int = 0):
        info = tfds.builder_from_directory(builder.folder(prepared)).info
        present = list(info.splits)
        names = present if split == "all" else [split]
        if not set(names) <= set(present):
            raise UserError(
                f"{prepared} has no split {split!r}, only {', '.join(present)}: "
                "the dataset was prepared as a whole; set --config.data.split=all"
            )
        self.split = split
        self.features = info.features
        paths = [path for name in names for path in info.splits[name].filepaths]
        lengths = [length for name in names for length in info.splits[name].shard_lengths]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self.numbers = np.arange(limit or self._starts[-1])
        if len(self.numbers) > self._starts[-1]:
            raise UserError(
                f"config.data.train = {limit} is more than the {self._starts[-1]:,} training products: "
                "give at most that many, or 0 for all"
            )
        # Without read-ahead a random read touches one chunk instead of megabytes.
        self._readers = [ArrayRecordReader(str(path), options="readahead_buffer_size:0") for path in paths]

    @staticmethod
    def has(prepared: Path, split: str) -> bool:
        """Returns whether a prepared dataset has a split."""
        return split in tfds.builder_from_directory(builder.folder(prepared)).info.splits

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, numbers: np.ndarray) -> "Records":
        """Returns a view of these records only, renumbered from 0 in the given order."""
        taken = copy.copy(self)
        taken.numbers = self.numbers[numbers]
        return taken

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the serialized records with these numbers, (n,) bytes objects, in the same order."""
        numbers = self.numbers[numbers]
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        serialized = np.empty(len(numbers), dtype=object)
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            serialized[rows] = self._readers[shard].read((numbers[rows] - self._starts[shard]).tolist())
        return serialized

    def parse(self, serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns one record's fields, its image still encoded; runs in a tf.data graph."""
        return self.features.deserialize_example(serialized, decoders={"image": tfds.decode.SkipDecoding()})

    def picture(self, number: int) -> bytes:
        """Returns the encoded picture of one record."""
        return _fields(self.read(np.asarray([number]))[0])["image"].bytes_list.value[0]

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray | list[tuple[str, ...]]]:
        """Returns the values of all N records in these columns by name: (N, ...) float32, or N tuples of texts.

        The columns must hold float32 arrays of a fixed shape or sequences of texts.

        Raises:
          UserError: the dataset lacks one of the columns.
        """
        self.require(names)
        texts = {name for name in names if isinstance(self.features[name], tfds.features.Sequence)}
        rows: dict[str, list] = {name: [] for name in names}
        for serialized in self._all():
            fields = _fields(serialized)
            for name, values in rows.items():
                stored = fields[name]
                values.append(_texts(stored) if name in texts else np.asarray(stored.float_list.value, np.float32))
        return {
            name: values if name in texts else np.stack(values).reshape(len(self), *self.features[name].shape)
            for name, values in rows.items()
        }

    def require(self, names: Sequence[str], purpose: str = "") -> None:
        """Raises UserError if the dataset lacks one of these columns; the message adds `purpose` after their names."""
        if missing := [name for name in names if name not in self.features]:
            raise UserError(
                f"the prepared dataset has no {', '.join(missing)}{purpose}: prepare the dataset with "
                "--config.features.detector=foreground or another detector"
            )

    def texts(self) -> Iterator[tuple[list[bytes], np.ndarray, list[bytes]]]:
        """Yields the texts of all records in order, a block of n records at a time.

        A block is (all captions of its records, the number of captions of each, their attributes as JSON): lists, and
        an array (n,) int64.
        """
        wanted = {
            "captions": tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64),
            "attributes": tf.io.FixedLenFeature([], tf.string),
        }
        for start in range(0, len(self), READ_BLOCK):
            serialized = self.read(np.arange(start, min(start + READ_BLOCK, len(self))))
            parsed = tf.io.parse_example(tf.constant(serialized, tf.string), wanted)
            captions = parsed["captions"]
            attributes = parsed["attributes"].numpy().tolist()
            yield captions.flat_values.numpy().tolist(), captions.row_lengths().numpy(), attributes

    def products(self) -> Iterator[tuple[Product, int]]:
        """Yields (product without its picture, its group as an integer) for every record, in order."""
        for serialized in self._all():
            product = _product(_fields(serialized))
            yield product, int(product.group)

    def products_with_pictures(self) -> Iterator[tuple[Product, bytes, np.ndarray | None]]:
        """Yields every product in order with its encoded picture and its best crop.

        The crop is (4,) float32: left, top, right, bottom as shares of the picture; None if none was prepared.
        """
        for serialized in self._all():
            fields = _fields(serialized)
            crop = np.asarray(fields["crops"].float_list.value[:4], np.float32) if "crops" in self.features else None
            yield _product(fields), fields["image"].bytes_list.value[0], crop

    def product_with_features(self, number: int) -> tuple[Product, dict[str, np.ndarray | str | tuple[str, ...]]]:
        """Returns the product of one record and its computed features by column name, without pictures."""
        fields = _fields(self.read(np.asarray([number]))[0])
        features = {}
        for name in self.features.keys() - _PRODUCT_FIELDS:
            stored, feature = fields[name], self.features[name]
            if isinstance(feature, tfds.features.Sequence):
                features[name] = _texts(stored)
            elif isinstance(feature, tfds.features.Text):
                (features[name],) = _texts(stored)
            else:
                values = stored.float_list.value or stored.int64_list.value
                shape = [-1 if side is None else side for side in feature.shape]
                features[name] = np.asarray(values, feature.np_dtype).reshape(shape)
        return _product(fields), features

    def _all(self) -> Iterator[bytes]:
        for start in range(0, len(self), READ_BLOCK):
            yield from self.read(np.arange(start, min(start + READ_BLOCK, len(self))))


def _product(fields: Mapping[str, tf.train.Feature]) -> Product:
    (ident,), (category,), (attributes,) = (_texts(fields[name]) for name in ("id", "category", "attributes"))
    group = fields["group"].int64_list.value[0]
    return Product(ident, Path(), _texts(fields["captions"]), category, json.loads(attributes), str(group))


def _fields(serialized: bytes) -> Mapping[str, tf.train.Feature]:
    return tf.train.Example.FromString(serialized).features.feature


def _texts(stored: tf.train.Feature) -> tuple[str, ...]:
    return tuple(text.decode() for text in stored.bytes_list.value)
