"""The order of training: which record stands at each position of an endless stream.

TensorFlow's RandomIndexShuffle is a cipher on indices, so the record at a position is a pure function of the seed and
the position, computed in constant time, and nothing is shuffled in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxclip.errors import UserError
from jaxclip.runtime.tensorflow import tf

PERIOD = 1000
"""Number of positions in which each source of a mixture stands as often as its weight says, rounded."""
OF_RECORDS, OF_SOURCES = 0, 1 << 20
"""Third words of the seeds of the permutations of records (plus the number of the source) and of sources."""
Order = Callable[[tf.Tensor], tf.Tensor]
"""(b,) int64 positions -> (b,) int64 numbers of records; runs in a tf.data graph."""


def shuffled(total: int, seed: int) -> Order:
    """Returns the order in which every epoch is a different permutation of `total` records."""

    def numbers(positions: tf.Tensor) -> tf.Tensor:
        return _permuted(positions, tf.fill(tf.shape(positions), tf.constant(total, tf.int64)), seed, OF_RECORDS)

    return numbers


@dataclass(frozen=True)
class Mixture:
    """The catalogue that each of N training records is from, and how often each catalogue is drawn.

    Attributes:
      sources: (N,) number of each record's catalogue.
      quotas: positions of each catalogue in every PERIOD positions; they sum to PERIOD.
    """

    sources: np.ndarray
    quotas: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], weights: Sequence[float], record_names: Sequence[str]) -> "Mixture":
        """Returns the mixture of catalogues with these names and weights.

        Args:
          names: the names of the S catalogues.
          weights: their S weights; only their ratios matter.
          record_names: the name of each record's catalogue.

        Raises:
          UserError: a catalogue has no training record, or so small a weight that it would never be drawn.
        """
        numbers = {name: number for number, name in enumerate(names)}
        sources = np.array([numbers[name] for name in record_names], np.int64)
        shares = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
        quotas = np.floor(shares).astype(np.int64)
        quotas[np.argsort(quotas - shares, kind="stable")[: PERIOD - quotas.sum()]] += 1
        for name, quota, count in zip(names, quotas, np.bincount(sources, minlength=len(names)), strict=True):
            if not quota or not count:
                problem = "has no training products" if quota else f"has less than a share of 1/{PERIOD} of all weights"
                raise UserError(f"data.sources: {name} {problem}: leave it out, or change it")
        return cls(sources, quotas)

    def order(self, seed: int) -> Order:
        """Returns the order that draws each catalogue by its quota, and each of its records once in each of its epochs.

        In each PERIOD positions, the catalogues stand in another random order.
        """
        by_source = np.argsort(self.sources, kind="stable")
        sizes = np.bincount(self.sources, minlength=len(self.quotas))
        ends = np.cumsum(self.quotas)

        def numbers(positions: tf.Tensor) -> tf.Tensor:
            period = tf.fill(tf.shape(positions), tf.constant(PERIOD, tf.int64))
            slot = _permuted(positions, period, seed, OF_SOURCES)
            source = tf.searchsorted(tf.constant(ends), slot, side="right", out_type=tf.int64)
            quota = tf.gather(tf.constant(self.quotas), source)
            within = positions // PERIOD * quota + slot - tf.gather(tf.constant(ends - self.quotas), source)
            number = _permuted(within, tf.gather(tf.constant(sizes), source), seed, OF_RECORDS + source)
            first = tf.gather(tf.constant(np.cumsum(sizes) - sizes), source)
            return tf.gather(tf.constant(by_source), first + number)

        return numbers


def _permuted(positions: tf.Tensor, totals: tf.Tensor, seed: int, stream: tf.Tensor | int) -> tf.Tensor:
    """Returns each position's index (b,) in the permutation of its epoch, an epoch being `totals` (b,) positions."""
    epochs = tf.cast(positions // totals, tf.int32)
    streams = tf.cast(stream + tf.zeros_like(positions), tf.int32)
    seeds = tf.stack([tf.fill(tf.shape(epochs), seed), epochs, streams], axis=1)  # (b, 3)
    # The public wrapper, tf.random.experimental.index_shuffle, does not accept one seed per index.
    return tf.raw_ops.RandomIndexShuffle(index=positions % totals, seed=seeds, max_index=totals - 1, rounds=4)
