"""Uncertainty of what is measured on clustered, paired cases."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from math import log, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 20_260_101
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95 per cent interval."""

    value: float
    low: float
    high: float


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> NDArray[np.float64]:
    """Sum of `values` per distinct cluster, in order of first appearance."""
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros(len(index))
    np.add.at(sums, [index[name] for name in clusters], np.asarray(values, dtype=np.float64))
    return sums


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """sum(numerators) / sum(denominators) with a percentile bootstrap over clusters.

    Whole clusters (patients) are drawn with replacement, because the images of one patient are not
    independent (Davison and Hinkley 1997, 3.8). With denominators of 1 this is the mean; with paired
    differences as numerators it is the paired bootstrap. With one cluster nothing can be resampled:
    the interval is infinite. Raises ValueError when the denominators sum to zero.
    """
    top, bottom = cluster_sums(numerators, clusters), cluster_sums(denominators, clusters)
    if bottom.sum() <= 0:
        raise ValueError("nothing to average: the denominators sum to zero")
    value = float(top.sum() / bottom.sum())
    groups = len(top)
    if groups < 2:
        return Interval(value, -float("inf"), float("inf"))
    rng = np.random.default_rng(seed)
    # Drawing m clusters with replacement is a multinomial count per cluster; one matrix product
    # then does all resamples. Chunked so that 10,000 x 10,000 patients stays under 200 MB.
    ratios: list[NDArray[np.float64]] = []
    chunk = max(1, 20_000_000 // groups)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=size).astype(np.float64)
        below = counts @ bottom
        ratios.append((counts @ top)[below > 0] / below[below > 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def clustered_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over all items and its standard error, from each cluster's sum and number of items.

    The ratio estimator's linearised variance with the usual G / (G - 1) (Cochran 1977, 6.3); the
    error is infinite for a single cluster.
    """
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean = float(s.sum() / n.sum())
    if len(s) < 2:
        return mean, float("inf")
    scale = len(s) / (len(s) - 1)
    return mean, sqrt(scale * float(((s - mean * n) ** 2).sum())) / float(n.sum())


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X binomial(n, p)."""
    if k < 0:
        return 0.0
    if k >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    i = np.arange(k + 1)
    # log(n over i) as a running sum: only the k + 1 terms that are needed.
    steps = np.log(n - i[:-1]) - np.log(i[1:])
    logs = np.concatenate([[0.0], np.cumsum(steps)]) + i * log(p) + (n - i) * log1p(-p)
    return min(1.0, float(np.exp(logs).sum()))


def clopper_pearson(events: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """Exact two-sided interval of a proportion (Clopper and Pearson 1934). No trials: 0..1."""
    if not 0 <= events <= trials:
        raise ValueError(f"{events} events in {trials} trials")
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0)
    tail = (1 - confidence) / 2
    low = 0.0 if events == 0 else _root(events - 1, trials, 1 - tail)
    high = 1.0 if events == trials else _root(events, trials, tail)
    return Interval(events / trials, low, high)


def _root(k: int, n: int, target: float) -> float:
    """The p at which binomial_cdf(k, n, p), which falls with p, equals `target`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_cdf(k, n, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@cache
def _discarded(queries: int, percentile: float, confidence: float) -> int:
    """The largest t >= 1 with F(t; queries, 1 - percentile) <= 1 - confidence; 0 when none."""
    t = 0
    while binomial_cdf(t + 1, queries, 1 - percentile) <= 1 - confidence:
        t += 1
    return t


def early_stopping_percentile(
    values: Sequence[float], percentile: float, confidence: float = 0.99
) -> float | None:
    """An upper bound of the percentile that holds with `confidence`; None from too few values.

    The t - 1 slowest are discarded and the slowest left is reported (MLPerf inference rules, early
    stopping): p90 needs 64 values, p99 needs 662.
    """
    t = _discarded(len(values), percentile, confidence) if values else 0
    return None if t == 0 else sorted(values)[len(values) - t]
