"""Bootstrap intervals and paired tests, by resampling queries (Efron & Tibshirani 1993)."""

from collections.abc import Callable, Iterator

import numpy as np

SAMPLES = 1000
_BLOCK = 4_000_000  # largest number of draws at once, in whole resamples; a larger resample is drawn alone

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`statistic(values (M, Q), weights (S, Q)) -> (M, S)`, for M metrics of Q queries in S resamples.

A row of weights says how often each query's value counts."""


def mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns (M, S) the weighted means of values (M, Q) under weights (S, Q)."""
    return values @ weights.T / weights.sum(axis=1)


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns (M, S) the medians of values (M, Q), each repeated as often as its integer weight (S, Q).

    All rows of weights must have the same sum.
    """
    result = np.empty((len(values), len(weights)))
    size = int(weights[0].sum())
    for row, row_values in enumerate(values):
        order = np.argsort(row_values, kind="stable")
        cumulative = np.cumsum(weights[:, order], axis=1)  # (S, Q)
        lower = (cumulative > (size - 1) // 2).argmax(axis=1)
        upper = (cumulative > size // 2).argmax(axis=1)
        result[row] = (row_values[order[lower]] + row_values[order[upper]]) / 2
    return result


def bootstrap_interval(values, *, statistic: Statistic = mean, samples: int = SAMPLES, seed: int = 0):
    """Returns (low, high), the 95% bootstrap interval (percentile method) of a statistic over queries.

    The same seed gives the same interval, and metrics passed together share their resamples. If all queries have the
    same value (all hit, or none), the interval has zero width, which is a limit of the method, not a sign of certainty.

    Args:
      values: (Q,) the values of one metric, or (M, Q) those of M metrics, for Q queries.
      statistic: `mean`, `median`, or another weighted statistic.
      samples: number of resamples.
      seed: seed of the resampling.

    Returns: two floats for (Q,), two (M,) arrays for (M, Q).

    Raises:
      ValueError: there are no queries, or a value is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim not in (1, 2) or not values.shape[-1] or not np.isfinite(values).all():
        raise ValueError(f"finite values (Q,) or (M, Q) with Q >= 1 expected, got {values.shape}")
    rows = np.atleast_2d(values)
    resampled = np.concatenate([statistic(rows, w) for w in _weights(rows.shape[1], samples, seed)], axis=1)  # (M, S)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=1)
    return (low, high) if values.ndim == 2 else (float(low[0]), float(high[0]))


def paired_bootstrap(a, b, *, samples: int = 10_000, seed: int = 0):
    """Returns the two-sided p-value of mean(a) - mean(b), where both were measured on the same queries.

    The differences are shifted to mean zero and resampled. p is the share of resampled means that are at least as far
    from zero as the observed mean; the observed mean counts as one of them, so p is at least 1 / (samples + 1). The
    same seed gives the same p, and metrics passed together share their resamples.

    Args:
      a: (Q,) the values of one metric of one run, or (M, Q) those of M metrics, for Q queries.
      b: the same metrics of the other run, for the same queries in the same order.
      samples: number of resamples.
      seed: seed of the resampling.

    Returns: a float for (Q,), an (M,) array for (M, Q).

    Raises:
      ValueError: the shapes differ or there are no queries.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.shape[-1]:
        raise ValueError(f"a and b must be values of the same queries, at least one, got {a.shape} and {b.shape}")
    difference = np.atleast_2d(a - b)
    observed = np.abs(difference.mean(axis=1, keepdims=True))  # (M, 1)
    centred = difference - difference.mean(axis=1, keepdims=True)
    # Sums of equal fractions can differ in their last bits; with the tolerance, ties with the observed mean count.
    threshold = observed - 1e-12 * np.maximum(1.0, observed)
    blocks = _weights(difference.shape[1], samples, seed)
    beyond = sum((np.abs(mean(centred, weights)) >= threshold).sum(axis=1) for weights in blocks)
    p = (beyond + 1) / (samples + 1)
    return p if a.ndim == 2 else float(p[0])


def _weights(size: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Yields float64 blocks (S, `size`) of how often each of `size` queries was drawn, `samples` rows in all."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // size)
    for start in range(0, samples, block):
        rows = min(block, samples - start)
        drawn = random.integers(size, size=(rows, size)) + np.arange(rows)[:, None] * size
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
