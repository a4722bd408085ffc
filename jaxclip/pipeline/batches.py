"""Batches whose order is a pure function of (seed, step), so training resumes at any step on any number of hosts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxclip.config.schema import Config
from jaxclip.errors import UserError
from jaxclip.pipeline import images, text
from jaxclip.pipeline.order import Order, shuffled
from jaxclip.pipeline.preprocess import Preprocess
from jaxclip.pipeline.records import Records
from jaxclip.pipeline.tokens import StoredTokens
from jaxclip.pipeline.words import CaptionTokenizer
from jaxclip.runtime.tensorflow import tf

Batch = dict[str, np.ndarray]
PICTURE_SEED = 0x5A17
"""Mixed into the seed of a position, to draw one of the record's pictures independently of all else."""


@dataclass(frozen=True)
class Partners:
    """The incorrect pairs of a split of N records: for each, the record whose text is paired with its picture.

    Attributes:
      partner: (N,) index of the partner within the split; negative if the record has no partner.
      similarity: (N,) cosine similarity of the two pictures; ignored if the record has no partner.

    Raises:
      UserError: no record has a partner, or a similarity is not finite.
    """

    partner: np.ndarray
    similarity: np.ndarray

    def __post_init__(self):
        paired = np.flatnonzero(self.partner >= 0)
        if not len(paired):
            raise UserError(
                f"the table of incorrect pairs is empty: none of its {len(self.partner)} products has a partner; "
                "train on more products (data.train) or with another incorrect_pairs.variant"
            )
        not_finite = paired[~np.isfinite(self.similarity[paired])]
        if len(not_finite):
            raise UserError(
                f"{len(not_finite)} similarities in the table of incorrect pairs are not finite; the first is "
                f"{self.similarity[not_finite[0]]}, of product {not_finite[0]}: delete incorrect_pairs/ in the "
                "folder of the prepared dataset, and the next training mines the pairs again"
            )

    def take(self, numbers: np.ndarray) -> "Partners":
        """Returns the partners of the records with these indices, as positions in `numbers`; drops all others."""
        new_numbers = np.full(len(self.partner), -1)
        new_numbers[numbers] = np.arange(len(numbers))
        partner = self.partner[numbers]
        return Partners(np.where(partner >= 0, new_numbers[partner], -1), self.similarity[numbers])


def training_batches(
    records: Records,
    tokens: StoredTokens | CaptionTokenizer,
    preprocess: Preprocess,
    config: Config,
    partners: Partners | None = None,
    *,
    steps: range,
    rows: np.ndarray | None = None,
    canvas: int = 0,
    order: Order | None = None,
) -> Iterator[Batch]:
    """Yields the batches of consecutive steps, or only `rows` of each batch, without reading the others.

    Row i of step s is the record at position s * config.batch_size + i of an endless stream (see `pipeline.order`), in
    which every epoch is a different permutation of the split.
    The choice of one of the record's pictures and captions, and their augmentation, depend only on config.seed and the
    row's position.

    Each batch has image (b, S, S, 3) uint8, text (b, T) int32 and group (b,) int32, where b is the number of `rows`, S
    the image size and T the context length of `preprocess`. With a `canvas` the device resizes the pictures: S is then
    the side of the canvas, and extent (b, 2) int32 is the height and width of each picture in it (`images.augment`).

    With `partners` a batch also has incorrect_text (b, T) int32, the partner's text with its own random augmentation,
    similarity (b,) float32, and has_incorrect (b,) bool. If a record has no partner, has_incorrect is False, the
    incorrect text is another augmentation of its own text and the similarity is 1.

    Args:
      tokens: the tokens of the captions of `records`, if captions are not augmented; or what tokenizes captions. Both
        give the same batches.
      config: batch_size, seed, augmentation and data.workers are used.
      partners: the partner of each of the `records`; None for batches without incorrect pairs.
      rows: the rows of the global batch that this process reads; None for all of them.
      canvas: side, in pixels, of the squares that hold unscaled pictures; 0 = the pictures are resized here.
      order: the record at each position; None for `order.shuffled`.

    Raises:
      UserError: `partners` and `records` differ in length, or the towers are trained on crops and the dataset has none.
    """
    rows = np.arange(config.batch_size) if rows is None else rows
    if partners is not None and len(partners.partner) != len(records):
        raise UserError(
            f"the table of incorrect pairs has {len(partners.partner)} products, but the split has {len(records)}: "
            "delete incorrect_pairs/ in the folder of the prepared dataset, and the next training mines the pairs again"
        )
    if isinstance(tokens, StoredTokens):
        expected = len(records), preprocess.context_length, False
        found = len(tokens), tokens.context_length, config.augmentation.changes_captions
        if found != expected:
            raise ValueError(f"records, context length and augmentation of the tokens are {found}, not {expected}")
        texts = _StoredTexts(tokens)
    else:
        texts = _AugmentedTexts(records, tokens, preprocess, config)

    order = order or shuffled(len(records), config.seed)

    def positions(step: tf.Tensor) -> tf.Tensor:
        return step * config.batch_size + tf.constant(rows, tf.int64)

    dataset = _map(tf.data.Dataset.range(steps.start, steps.stop), positions, parallel=1)
    dataset = _map(dataset, _make_reader(records, texts, partners, order, len(rows)), parallel=2)
    augment = _make_augmenter(records, texts, preprocess, config, canvas)
    dataset = _map(dataset.unbatch(), augment, parallel=config.data.workers or tf.data.AUTOTUNE)
    tokenize = _make_batch_tokenizer(texts, len(rows), preprocess.context_length)
    dataset = _map(dataset.batch(len(rows), drop_remainder=True), tokenize, parallel=2)
    return dataset.prefetch(2).as_numpy_iterator()


class _AugmentedTexts:
    """Draws captions from the records, augments and tokenizes them."""

    def __init__(self, records: Records, encode: CaptionTokenizer, preprocess: Preprocess, config: Config):
        self._records, self._encode, self._preprocess, self._config = records, encode, preprocess, config

    def sources(self, numbers: tf.Tensor, load: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        """Returns what `parse` needs of the records with these numbers, (b, ...): the serialized records."""
        return load(numbers)

    def parse(self, source: tf.Tensor) -> dict[str, tf.Tensor]:
        """Returns what `draw` needs of one record."""
        return self._records.parse(source)

    def draw(self, record: dict[str, tf.Tensor], seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Returns a random caption of a record, its attributes, and the uniform draws for their augmentation."""
        captions = record["captions"]
        chosen = _draw_index(seed, tf.shape(captions)[0])
        return captions[chosen], record["attributes"], tf.random.stateless_uniform([text.MAX_DRAWS], seed + 1)

    def tokens(self, names: np.ndarray, attributes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns the token ids of a batch of results of `draw`, (b, T) int32."""
        return self._encode(
            text.augmented_captions(names, attributes, self._preprocess, self._config.augmentation, draws)
        )


class _StoredTexts:
    """Draws captions of which the tokens are stored; methods as in `_AugmentedTexts`."""

    def __init__(self, stored: StoredTokens):
        self._stored = stored
        self.tokens = stored.read

    def sources(self, numbers: tf.Tensor, load: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
        counts = tf.numpy_function(self._stored.counts, [numbers], tf.int64, stateful=False)
        return tf.stack([numbers, tf.ensure_shape(counts, numbers.shape)], axis=1)

    def parse(self, source: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"number": source[0], "count": tf.cast(source[1], tf.int32)}

    def draw(self, record: dict[str, tf.Tensor], seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return record["number"], _draw_index(seed, record["count"])


_Texts = _AugmentedTexts | _StoredTexts


def _make_augmenter(
    records: Records, texts: _Texts, preprocess: Preprocess, config: Config, canvas: int
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """Returns the function that parses, decodes and augments one example; texts are tokenized later, by batch."""
    crop, one_picture_each = _trained_on_crops(records, preprocess), records.one_picture_each

    def augment(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        record, position = records.parse(example["record"]), example["position"]
        # A position has four seeds: crop, flip, choice of the caption, and draws for `text.augmented_caption`.
        seed = tf.stack([tf.constant(config.seed, tf.int64), 4 * position])
        chosen = 0 if one_picture_each else _draw_index(seed ^ PICTURE_SEED, tf.shape(record["images"])[0])
        encoded, part = records.picture(record, chosen)
        picture, extent = images.augment(
            encoded,
            preprocess.image_size,
            preprocess.resize,
            config.augmentation,
            seed,
            preprocess.filter,
            part=part if crop else None,
            canvas=canvas,
        )
        fields = {
            "image": picture,
            "text": texts.draw(texts.parse(example["text"]) if "text" in example else record, seed + 2),
            "group": tf.cast(record["group"], tf.int32),
        }
        if canvas:
            fields |= {"extent": extent}
        if "incorrect_text" in example:
            partner_seed = tf.stack([tf.constant(config.seed, tf.int64), -4 * (position + 1)])
            fields |= {"incorrect_text": texts.draw(texts.parse(example["incorrect_text"]), partner_seed)}
            fields |= {name: example[name] for name in ("similarity", "has_incorrect")}
        return fields

    return augment


def _make_reader(
    records: Records, texts: _Texts, partners: Partners | None, order: Order, size: int
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the function that reads a batch.

    It maps b positions, (b,), to "position", the serialized "record" and, if tokens are stored, the source of its
    "text"; and with `partners` also to the source of the "incorrect_text", the "similarity", and "has_incorrect",
    whether the record has a partner.
    """

    def load(numbers: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(records.read, [numbers], tf.string, stateful=False), [size])

    def read(positions: tf.Tensor) -> dict[str, tf.Tensor]:
        numbers = order(positions)
        record = load(numbers)
        batch = {"position": positions, "record": record}
        if isinstance(texts, _StoredTexts):
            batch |= {"text": texts.sources(numbers, load)}
        if partners is None:
            return batch
        partner = tf.gather(tf.constant(partners.partner, tf.int64), numbers)
        similarity = tf.gather(tf.constant(partners.similarity, tf.float32), numbers)
        has_partner = partner >= 0
        return batch | {
            "incorrect_text": texts.sources(tf.where(has_partner, partner, numbers), load),
            "similarity": tf.where(has_partner, similarity, 1.0),
            "has_incorrect": has_partner,
        }

    return read


def _make_batch_tokenizer(
    texts: _Texts, size: int, context_length: int
) -> Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]]:
    """Returns the function that replaces the texts of a batch, the results of `draw`, by their token ids."""

    def tokenize(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = {
            name: tf.ensure_shape(
                tf.numpy_function(texts.tokens, fields, tf.int32, stateful=False), [size, context_length]
            )
            for name, fields in batch.items()
            if name.endswith("text")
        }
        return {**batch, **tokens}

    return tokenize


def _draw_index(seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns the index of one of `count` captions."""
    return tf.random.stateless_uniform([], seed, 0, count, tf.int32)


def image_batches(
    records: Records,
    preprocess: Preprocess,
    *,
    batch_size: int,
    places: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    workers: int = 0,
    crops: bool = False,
) -> Iterator[np.ndarray]:
    """Yields pictures in order, (b, S, S, 3) uint8; the last batch is padded with black pictures.

    b is the number of `rows` and S the image size of `preprocess`.

    With `crops`, or if the towers are trained on crops, the best stored crop replaces each picture.

    Args:
      batch_size: pictures in each global batch.
      places: (P, 2) the record of each picture, and its index in it; None for all pictures, record by record.
      rows: the rows of each global batch to yield; None for all of them.
      workers: pictures decoded in parallel; 0 lets tf.data choose.

    Raises:
      UserError: the towers are trained on crops and the dataset has none.
    """
    crop = _trained_on_crops(records, preprocess) or crops
    rows = np.arange(batch_size) if rows is None else rows
    places = records.picture_places if places is None else places
    parallel = workers or tf.data.AUTOTUNE

    def load(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = places[numbers[numbers < len(places)]]
        different, back = np.unique(inside[:, 0], return_inverse=True)  # pictures of one record are read once
        blank = np.full(len(numbers) - len(inside), b"")
        return np.concatenate([records.read(different)[back], blank]), np.pad(inside[:, 1], (0, len(blank)))

    def read(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        numbers = step * batch_size + tf.constant(rows, tf.int64)
        return tf.numpy_function(load, [numbers], (tf.string, tf.int64), stateful=False)

    def example(serialized: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        blank = tf.zeros([preprocess.image_size, preprocess.image_size, 3], tf.uint8)
        return tf.cond(tf.strings.length(serialized) == 0, lambda: blank, lambda: picture(serialized, index))

    def picture(serialized: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        encoded, part = records.picture(records.parse(serialized), index)
        pixels = images.decode(encoded)
        pixels = images.cut(pixels, part) if crop else pixels
        return images.resize(pixels, preprocess.image_size, preprocess.resize, preprocess.filter)

    batches = -(-len(places) // batch_size)
    dataset = _map(tf.data.Dataset.range(batches), read, parallel=2).unbatch()
    dataset = _map(dataset, example, parallel=parallel)
    return dataset.batch(len(rows), drop_remainder=True).prefetch(2).as_numpy_iterator()


def _trained_on_crops(records: Records, preprocess: Preprocess) -> bool:
    """Returns whether the towers are trained on crops; UserError if they are and the dataset has none."""
    crop = preprocess.picture == "crop"
    if crop:
        records.require(["crops"], ", on which the towers are trained")
    return crop


def _map(dataset: tf.data.Dataset, function: Callable, *, parallel: int) -> tf.data.Dataset:
    """Returns the dataset with a function applied to each element, in order, `parallel` at a time.

    AutoGraph is off: no Python `if` or loop here depends on a tensor, and AutoGraph would spend seconds at every start
    parsing and rewriting all called code, including TFDS.
    """
    mapped = tf.autograph.experimental.do_not_convert(function)
    return dataset.map(mapped, num_parallel_calls=parallel, deterministic=True)
