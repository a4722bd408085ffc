"""The record at a position is a pure function of the seed; mixtures keep their weights and each catalogue's epochs."""

from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxclip.errors import UserError
from jaxclip.pipeline.order import PERIOD, Mixture, shuffled

PERIODS = 3
MIXTURES = st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 10)), min_size=1, max_size=5)
EXAMPLES = settings(max_examples=15, deadline=None)


def numbers(order, positions):
    return order(tf.constant(positions, tf.int64)).numpy()


def mixed(sizes, weights, seed=0):
    """Returns the catalogue of each record, records of all catalogues alternating, and the mixture."""
    names = [f"catalogue {number}" for number in range(len(sizes))]
    rounds = [name for number in range(max(sizes)) for name, size in zip(names, sizes, strict=True) if number < size]
    return np.array([names.index(name) for name in rounds]), Mixture.of(names, weights, rounds)


@pytest.mark.parametrize("total", [1, 2, 19])
def test_every_epoch_of_one_catalogue_is_another_permutation(total):
    epochs = numbers(shuffled(total, 3), np.arange(6 * total)).reshape(6, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()
    assert len(np.unique(epochs, axis=0)) == {1: 1, 2: 2, 19: 6}[total]


def test_orders_are_the_same_in_every_version():
    assert numbers(shuffled(7, 5), np.arange(14)).tolist() == [5, 0, 1, 4, 3, 2, 6, 3, 0, 6, 4, 2, 1, 5]
    _, mixture = mixed([3, 4], [1, 2])
    expected = [3, 3, 2, 6, 3, 4, 5, 5, 6, 6, 1, 1, 1, 3, 1, 2, 5, 1, 6, 1]
    assert numbers(mixture.order(5), np.arange(990, 1010)).tolist() == expected


@EXAMPLES
@given(MIXTURES, st.integers(-(2**31), 2**31 - 1))
def test_in_every_period_each_catalogue_has_its_share_and_in_each_of_its_epochs_each_record_once(catalogues, seed):
    sizes, weights = zip(*catalogues, strict=True)
    sources, mixture = mixed(sizes, weights)
    drawn = numbers(mixture.order(seed), np.arange(PERIODS * PERIOD))
    shares = np.array(weights) / sum(weights) * PERIOD
    for period in drawn.reshape(PERIODS, PERIOD):
        counts = np.bincount(sources[period], minlength=len(sizes))
        assert counts.tolist() == mixture.quotas.tolist() and (abs(counts - shares) < 1).all()
    for number, size in enumerate(sizes):
        # Whole periods have the first records of a catalogue's epochs, so that only the last epoch is incomplete.
        times = Counter(drawn[sources[drawn] == number].tolist())
        assert set(times) <= set(np.flatnonzero(sources == number)) and len(times) == min(size, times.total())
        assert max(times.values()) - min(times.values()) <= 1


def test_a_catalogue_whose_epochs_end_with_a_period_has_every_record_equally_often_in_it():
    _, mixture = mixed([50, 20, 30], [5, 2, 3])
    for period in numbers(mixture.order(2), np.arange(2 * PERIOD)).reshape(2, PERIOD):
        assert (np.bincount(period, minlength=100) == 10).all()


@EXAMPLES
@given(MIXTURES, st.integers(-(2**31), 2**31 - 1), st.data())
def test_a_mixture_is_a_pure_function_of_seed_and_position(catalogues, seed, data):
    _, mixture = mixed(*zip(*catalogues, strict=True))
    order = mixture.order(seed)
    whole = numbers(order, np.arange(2 * PERIOD))
    asked = data.draw(st.lists(st.integers(0, 2 * PERIOD - 1), min_size=1, max_size=40))
    assert numbers(order, asked).tolist() == whole[asked].tolist()


def test_other_seeds_epochs_and_periods_have_other_orders():
    sources, mixture = mixed([50, 20, 30], [5, 2, 3])
    first, second = (numbers(mixture.order(seed), np.arange(2 * PERIOD)) for seed in (0, 1))
    assert (first != second).mean() > 0.9 and (sources[first] != sources[second]).mean() > 0.5
    assert (first[:PERIOD] != first[PERIOD:]).mean() > 0.9
    assert (sources[first[:PERIOD]] != sources[first[PERIOD:]]).mean() > 0.5
    # Catalogues of equal size are not in the same order: the halves of them that the first period has differ.
    sources, mixture = mixed([1000, 1000], [1, 1])
    drawn = numbers(mixture.order(0), np.arange(PERIOD))
    one, other = (set(drawn[sources[drawn] == number] // 2) for number in (0, 1))
    assert len(one) == len(other) == 500 and len(one & other) < 350


def test_catalogues_are_spread_over_a_period():
    sources, mixture = mixed([10, 10], [3, 1])
    blocks = sources[numbers(mixture.order(1), np.arange(PERIOD))].reshape(10, 100)
    assert (abs(blocks.sum(axis=1) - 25) < 15).all()


def test_catalogues_without_records_or_with_a_negligible_weight_are_errors():
    with pytest.raises(UserError, match=r"data\.sources: b has no training products: leave it out"):
        Mixture.of(["a", "b"], [1, 1], ["a", "a"])
    with pytest.raises(UserError, match=r"data\.sources: a has less than a share of 1/1000 of all weights"):
        Mixture.of(["a", "b"], [1, 5000], ["a", "b"])
