"""Intervals cover as often as they claim, comparisons see a difference where there is one, and seeds decide all."""

import numpy as np
import pytest

from jaxclip.ranking.significance import bootstrap_interval, mean, median, paired_bootstrap


@pytest.mark.parametrize(
    ("statistic", "truth", "draw"),
    [(mean, 0.3, lambda random: random.random(150) < 0.3), (median, 1.0, lambda random: random.normal(1, 2, 151))],
)
def test_95_percent_intervals_cover_the_truth_about_95_percent_of_the_time(statistic, truth, draw):
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(draw(np.random.default_rng(seed)), statistic=statistic, samples=400, seed=seed)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_weighted_median_equals_the_median_of_the_drawn_values():
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 8):
        values = random.integers(0, 5, (3, size)).astype(float)
        weights = random.multinomial(size, np.full(size, 1 / size), size=20).astype(float)
        expected = [[np.median(np.repeat(row, w.astype(int))) for w in weights] for row in values]
        np.testing.assert_array_equal(median(values, weights), expected)


def test_several_metrics_give_the_intervals_they_give_alone():
    values = np.random.default_rng(0).random((3, 50))
    low, high = bootstrap_interval(values, seed=5)
    for row in range(3):
        assert bootstrap_interval(values[row], seed=5) == pytest.approx((low[row], high[row]))


def test_the_seed_decides_and_block_sizes_do_not(monkeypatch):
    values = np.random.default_rng(0).random(40)
    whole = bootstrap_interval(values, seed=1)
    assert whole == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    monkeypatch.setattr("jaxclip.ranking.significance._BLOCK", 100)
    assert bootstrap_interval(values, seed=1) == pytest.approx(whole)


def test_paired_bootstrap_is_small_for_a_difference_and_uniform_without_one():
    random = np.random.default_rng(0)
    base = random.random(300)
    assert paired_bootstrap(base, base) == 1.0
    assert paired_bootstrap(base + 0.05 + random.normal(0, 0.1, 300), base, samples=2000) < 0.002
    ps = [paired_bootstrap(random.random(80), random.random(80), samples=200, seed=seed) for seed in range(200)]
    assert np.mean(np.array(ps) < 0.05) < 0.11
    assert 0.4 < np.mean(ps) < 0.6


def test_unusable_values_raise_with_their_shapes():
    with pytest.raises(ValueError, match=r"\(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, np.nan])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_bootstrap([1, 2], [1, 2, 3])
