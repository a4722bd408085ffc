"""Bootstrap intervals have their nominal coverage, paired tests detect differences, and seeds determine the result."""

import numpy as np
import pytest

from jaxclip.ranking.significance import bootstrap_interval, mean, median, paired_bootstrap


@pytest.mark.parametrize(
    ("statistic", "truth", "sample"),
    [(mean, 0.3, lambda random: random.random(150) < 0.3), (median, 1.0, lambda random: random.normal(1, 2, 151))],
)
def test_95_percent_intervals_contain_the_truth_about_95_percent_of_the_time(statistic, truth, sample):
    covered = 0
    for seed in range(300):
        low, high = bootstrap_interval(sample(np.random.default_rng(seed)), statistic=statistic, samples=400, seed=seed)
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.985


def test_the_weighted_median_equals_the_median_of_repeated_values():
    random = np.random.default_rng(0)
    for size in (1, 2, 7, 8):
        values = random.integers(0, 5, (3, size)).astype(float)
        weights = random.multinomial(size, np.full(size, 1 / size), size=20).astype(float)
        expected = [[np.median(np.repeat(row, counts.astype(int))) for counts in weights] for row in values]
        np.testing.assert_array_equal(median(values, weights), expected)


def test_metrics_passed_together_have_the_same_intervals_as_alone():
    values = np.random.default_rng(0).random((3, 50))
    low, high = bootstrap_interval(values, seed=5)
    for row in range(3):
        assert bootstrap_interval(values[row], seed=5) == pytest.approx((low[row], high[row]))


def test_the_interval_depends_on_the_seed_and_not_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).random(40)
    whole = bootstrap_interval(values, seed=1)
    assert whole == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    monkeypatch.setattr("jaxclip.ranking.significance._BLOCK", 100)
    assert bootstrap_interval(values, seed=1) == pytest.approx(whole)


def test_the_p_value_is_small_for_a_difference_and_uniform_without_one():
    random = np.random.default_rng(0)
    base = random.random(300)
    assert paired_bootstrap(base, base) == 1.0
    assert paired_bootstrap(base + 0.05 + random.normal(0, 0.1, 300), base, samples=2000) < 0.002
    p_values = [paired_bootstrap(random.random(80), random.random(80), samples=200, seed=seed) for seed in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.11
    assert 0.4 < np.mean(p_values) < 0.6


def test_unusable_values_raise_with_their_shapes():
    with pytest.raises(ValueError, match=r"\(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([1.0, np.nan])
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        paired_bootstrap([1, 2], [1, 2, 3])
