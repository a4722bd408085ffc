"""Random access to the records of a prepared dataset."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from jaxclip.catalog import builder
from jaxclip.catalog.product import Product
from jaxclip.errors import UserError
from jaxclip.runtime.tensorflow import tf

READ_BLOCK = 1024  # records read at a time
_PRODUCT_FIELDS = {"id", "images", "pictures", "captions", "category", "attributes", "group", "source"}


class Records:
    """The records of one split, or "all", of a prepared dataset; a record's number is its index from 0.

    A record is a product with its pictures.

    Only the first `limit` records are used, all if it is 0; they are a random sample, because a prepared dataset stores
    its records in random order.

    Attributes:
      split: the name of the split, or "all".
      features: the TFDS features of a record.
      one_picture_each: whether every product of the dataset has exactly one picture.
      numbers: (N,) index of each record within the split; 0..N-1 unless `take` selected a subset.
    """

    def __init__(self, prepared: Path, split: str, limit: int = 0):
        info = tfds.builder_from_directory(builder.folder(prepared)).info
        present = list(info.splits)
        names = present if split == "all" else [split]
        if not set(names) <= set(present):
            reason = (
                "the dataset was prepared as a whole; set --config.data.split=all"
                if builder.WHOLE in present
                else "prepare it with --config.data.validation, or choose another --config.data.split"
            )
            raise UserError(f"{prepared} has no split {split!r}, only {', '.join(present)}: {reason}")
        self.split = split
        facts = builder.metadata(prepared)
        self.one_picture_each = facts["pictures"] == facts["products"]
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
        if "picture_counts" in taken.__dict__:
            taken.picture_counts = self.picture_counts[numbers]
        taken.numbers = self.numbers[numbers]
        return taken

    def main_pictures(self) -> "Records":
        """Returns a view of these records in which each product has only its main picture."""
        view = copy.copy(self)
        view.picture_counts = np.ones(len(self), np.int64)
        return view

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
        """Returns one record's fields, its images (n,) still encoded; runs in a tf.data graph.

        This is faster than `deserialize_example` of TFDS, which decodes sequences in a loop.
        """
        parsed = tf.io.parse_single_example(serialized, _stored_types(self.features))
        for name, feature in self.features.items():
            if isinstance(feature, tfds.features.Tensor) and feature.shape:
                shape = [-1 if side is None else side for side in feature.shape]
                parsed[name] = tf.reshape(tf.cast(parsed[name], feature.tf_dtype), shape)
        return parsed

    @staticmethod
    def picture(record: Mapping[str, tf.Tensor], index: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns a picture of a parsed record, still encoded, and its best crop, (4,), None if none was prepared."""
        if "crops" not in record:
            return record["images"][index], None
        first_crop = tf.reduce_sum(record["counts"][:index, 1])
        return record["images"][index], record["crops"][first_crop]

    @cached_property
    def picture_counts(self) -> np.ndarray:
        """(N,) number of pictures of each record; reads all records if the dataset has products with several."""
        if self.one_picture_each:
            return np.ones(len(self), np.int64)
        return np.array([len(_fields(serialized)["images"].bytes_list.value) for serialized in self._all()])

    @property
    def picture_owners(self) -> np.ndarray:
        """(P,) the record of each picture, in the order of the records."""
        return np.repeat(np.arange(len(self)), self.picture_counts)

    @property
    def picture_places(self) -> np.ndarray:
        """(P, 2) the record of each picture, and its index among the record's pictures."""
        owners = self.picture_owners
        firsts = np.cumsum(self.picture_counts) - self.picture_counts
        return np.stack([owners, np.arange(len(owners)) - firsts[owners]], axis=1)

    def pictures(self, number: int) -> list[bytes]:
        """Returns the encoded pictures of one record, the main picture first."""
        return list(_fields(self.read(np.asarray([number]))[0])["images"].bytes_list.value)

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray | list[tuple[str, ...]]]:
        """Returns the values of all N records in these columns by name: (N, ...) float32, or N tuples of texts.

        They are those of each product's first crop. The columns must hold float32 arrays or texts of each crop.

        Raises:
          UserError: the dataset lacks one of the columns.
        """
        self.require(names)
        rows: dict[str, list] = {name: [] for name in names}
        for serialized in self._all():
            fields = _fields(serialized)
            crops = len(fields["crops"].float_list.value) // 4
            for name, values in rows.items():
                stored, feature = fields[name], self.features[name]
                if isinstance(feature, tfds.features.Sequence):
                    texts = _texts(stored)
                    values.append(texts[: len(texts) // crops])
                else:
                    width = math.prod(feature.shape[1:])
                    values.append(np.asarray(stored.float_list.value[:width], np.float32).reshape(feature.shape[1:]))
        return {
            name: values if isinstance(self.features[name], tfds.features.Sequence) else np.stack(values)
            for name, values in rows.items()
        }

    def require(self, names: Sequence[str], purpose: str = "") -> None:
        """Raises UserError if the dataset lacks one of these columns; the message adds `purpose` after their names."""
        if missing := [name for name in names if name not in self.features]:
            raise UserError(
                f"the prepared dataset has no {', '.join(missing)}{purpose}: prepare the dataset with "
                "--config.features.detector=foreground or another detector"
            )

    @property
    def total(self) -> int:
        """The number of records of the split."""
        return int(self._starts[-1])

    @property
    def whole(self) -> bool:
        """Whether these are all records of the split."""
        return len(self.numbers) == self.total

    def fingerprint(self) -> str:
        """Returns 12 hex digits of a hash of the split and the numbers of these records in it."""
        return hashlib.sha256(self.split.encode() + self.numbers.astype("<i8").tobytes()).hexdigest()[:12]

    def groups(self) -> np.ndarray:
        """Returns (N,) int64 the group of each record; reads all records."""
        return self._column("group", tf.int64)

    def ids(self) -> list[str]:
        """Returns the id of each product; reads all records."""
        return [id_.decode() for id_ in self._column("id", tf.string)]

    def sources(self) -> list[str]:
        """Returns the name of each record's catalogue, in a dataset of several; reads all records."""
        return [name.decode() for name in self._column("source", tf.string)]

    def _column(self, name: str, dtype: tf.DType) -> np.ndarray:
        """Returns (N,) the values of a column that has one in each record."""
        wanted = {name: tf.io.FixedLenFeature([], dtype)}
        parsed = [tf.io.parse_example(tf.constant(b, tf.string), wanted)[name].numpy() for b in self._blocks()]
        return np.concatenate([np.empty(0, parsed[0].dtype if parsed else np.int64), *parsed])

    def texts(self) -> Iterator[tuple[list[bytes], np.ndarray, list[bytes]]]:
        """Yields the texts of all records in order, a block of n records at a time.

        A block is (all captions of its records, the number of captions of each, their attributes as JSON): lists, and
        an array (n,) int64.
        """
        wanted = {
            "captions": tf.io.RaggedFeature(tf.string, row_splits_dtype=tf.int64),
            "attributes": tf.io.FixedLenFeature([], tf.string),
        }
        for serialized in self._blocks():
            parsed = tf.io.parse_example(tf.constant(serialized, tf.string), wanted)
            captions = parsed["captions"]
            attributes = parsed["attributes"].numpy().tolist()
            yield captions.flat_values.numpy().tolist(), captions.row_lengths().numpy(), attributes

    def products(self) -> Iterator[tuple[Product, int]]:
        """Yields (product, its group as an integer) for every record, in order; its pictures are names only."""
        for serialized in self._all():
            product = _product(_fields(serialized))
            yield product, int(product.group)

    def products_with_pictures(self) -> Iterator[tuple[Product, list[tuple[bytes, np.ndarray | None]]]]:
        """Yields every product in order with its encoded pictures and the best crop of each.

        A crop is (4,) float32: left, top, right, bottom as shares of the picture; None if none was prepared.
        """
        for serialized in self._all():
            fields = _fields(serialized)
            pictures = fields["images"].bytes_list.value
            crops: Sequence[np.ndarray | None] = [None] * len(pictures)
            if "crops" in self.features:
                boxes = np.asarray(fields["crops"].float_list.value, np.float32).reshape(-1, 4)
                crops = boxes[_first_crops(fields["counts"].int64_list.value)]
            yield _product(fields), list(zip(pictures, crops, strict=True))

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
        return itertools.chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yields the serialized records in order, up to READ_BLOCK at a time."""
        for start in range(0, len(self), READ_BLOCK):
            yield self.read(np.arange(start, min(start + READ_BLOCK, len(self))))


def _stored_types(features: tfds.features.FeaturesDict) -> dict[str, tf.io.FixedLenFeature | tf.io.RaggedFeature]:
    """Returns how each column of a record is stored: a single value, or a list of any length."""

    def stored_type(feature: tfds.features.FeatureConnector) -> tf.io.FixedLenFeature | tf.io.RaggedFeature:
        if isinstance(feature, tfds.features.Sequence):
            return tf.io.RaggedFeature(tf.string)
        dtype = tf.string if isinstance(feature, tfds.features.Text) else feature.tf_dtype
        dtype = dtype if dtype in (tf.string, tf.float32) else tf.int64
        return tf.io.RaggedFeature(dtype) if feature.shape else tf.io.FixedLenFeature([], dtype)

    return {name: stored_type(feature) for name, feature in features.items()}


def _product(fields: Mapping[str, tf.train.Feature]) -> Product:
    (ident,), (category,), (attributes,) = (_texts(fields[name]) for name in ("id", "category", "attributes"))
    (pictures,) = _texts(fields["pictures"])
    entries = json.loads(pictures)
    names, roles = zip(*entries, strict=True) if isinstance(entries[0], list) else (entries, ())
    return Product(
        ident,
        tuple(map(Path, names)),
        _texts(fields["captions"]),
        category,
        json.loads(attributes),
        group=str(fields["group"].int64_list.value[0]),
        roles=roles,
        source=_texts(fields["source"])[0] if "source" in fields else "",
    )


def _first_crops(counts: Sequence[int]) -> list[int]:
    """Returns the index of the first crop of each picture, from a record's flat `counts`."""
    crops = np.asarray(counts).reshape(-1, 2)[:, 1]
    return [0, *np.cumsum(crops[:-1]).tolist()]


def _fields(serialized: bytes) -> Mapping[str, tf.train.Feature]:
    return tf.train.Example.FromString(serialized).features.feature


def _texts(stored: tf.train.Feature) -> tuple[str, ...]:
    return tuple(text.decode() for text in stored.bytes_list.value)
