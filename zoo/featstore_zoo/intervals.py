"""How sure a mean is, and whether two systems differ: bootstrap intervals and paired tests over utterances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray

LEVEL = 0.95
RESAMPLES = 2000
BLOCK = 1 << 22  # values drawn at a time: 32 MiB


class Interval(NamedTuple):
    """A mean over `count` utterances, and where it would lie in 95 of 100 repetitions; NaN where there is none."""

    mean: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # tuple.count is of no use here


class Difference(NamedTuple):
    """How much higher one system's values are than another's on the same utterances, and how likely it is by chance.

    p: of Wilcoxon's signed-rank test, two-sided; NaN below two utterances. `corrected`: see `holm`.
    """

    mean: float
    low: float
    high: float
    count: int  # type: ignore[assignment]
    p: float
    corrected: float = math.nan


def interval(values: Array, weights: Array | None = None, *, seed: int = 0) -> Interval:
    """The mean of values (N,) with its percentile bootstrap interval (Efron, 1979); values that are NaN are left out.

    weights: of each value: error rates of text are shares of characters, and their mean is that of the whole text.
    Utterances are drawn with replacement, `RESAMPLES` times. Below two there is a mean and no interval.
    """
    known = np.isfinite(values)
    x = np.asarray(values, np.float64)[known]
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)[known]
    if not len(x) or not w.sum():
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float((w * x).sum() / w.sum())
    if len(x) < 2:
        return Interval(mean, math.nan, math.nan, 1)
    low, high = np.quantile(_resampled(x, w, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), len(x))


def difference(one: Array, other: Array, *, seed: int = 0) -> Difference:
    """one - other over the utterances (N,) that have both values: Wilcoxon's signed-rank test (1945), ties by Pratt."""
    from scipy.stats import wilcoxon

    gap = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    gap = gap[np.isfinite(gap)]
    found = interval(gap, seed=seed)
    if len(gap) < 2:
        return Difference(*found, math.nan)
    p = float(wilcoxon(gap, zero_method="pratt").pvalue) if gap.any() else 1.0
    return Difference(*found, p)


def holm(values: Sequence[float]) -> list[float]:
    """p-values of a family of tests corrected so that one false finding in the whole of it has probability p (Holm,
    "A simple sequentially rejective multiple test procedure", 1979); NaN stays, and counts as no test."""
    p = np.asarray(values, np.float64)
    order = [i for i in np.argsort(p, kind="stable") if math.isfinite(p[i])]
    corrected, least = p.copy(), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = least
    return [float(value) for value in corrected]


def _resampled(x: Array, w: Array, seed: int) -> Array:
    """Means (RESAMPLES,) of values drawn anew."""
    rng = np.random.default_rng(seed)
    step = max(1, BLOCK // len(x))
    means = []
    for start in range(0, RESAMPLES, step):
        chosen = rng.integers(len(x), size=(min(step, RESAMPLES - start), len(x)))
        total = w[chosen].sum(1)
        means.append((w * x)[chosen].sum(1) / np.where(total > 0, total, np.nan))
    return np.nan_to_num(np.concatenate(means), nan=float((w * x).sum() / w.sum()))
