"""Intervals of caption metrics: percentile bootstrap over clusters, paired where two are compared."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from exporter.compare.captions.base import Float64, Tally
from exporter.compare.statistics import CONFIDENCE, RESAMPLES, SEED, Interval, cluster_sums

CHUNK = 20_000_000


def intervals(
    tallies: Mapping[str, Tally], clusters: Sequence[Hashable], *, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Each figure with its two-sided 95 per cent interval.

    Whole clusters (patients) are drawn with replacement, with the draws of `statistics.bootstrap_ratio`:
    the interval of a mean is the same to the last bits. One cluster alone has infinite bounds.
    """
    return _bootstrap({name: (tally, None) for name, tally in tallies.items()}, clusters, resamples)


def differences(
    own: Mapping[str, Tally],
    reference: Mapping[str, Tally],
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Own minus reference of each figure both have, paired: both are computed on the same draws."""
    both = {name: (tally, reference[name]) for name, tally in own.items() if name in reference}
    return _bootstrap(both, clusters, resamples)


def _bootstrap(
    asked: Mapping[str, tuple[Tally, Tally | None]], clusters: Sequence[Hashable], resamples: int
) -> dict[str, Interval]:
    groups = len(set(clusters))
    sums = {
        name: [_by_cluster(t, clusters) for t in pair if t is not None]
        for name, pair in asked.items()
    }
    values = {name: _figures(asked[name], [s.sum(0) for s in sums[name]]) for name in asked}
    if groups < 2:
        infinite = float("inf")
        return {name: Interval(float(v), -infinite, infinite) for name, v in values.items()}
    drawn: dict[str, list[Float64]] = {name: [] for name in asked}
    rng, step = np.random.default_rng(SEED), max(1, CHUNK // groups)
    for start in range(0, resamples, step):
        counts = rng.multinomial(
            groups, np.full(groups, 1 / groups), size=min(step, resamples - start)
        ).astype(np.float64)
        for name, parts in sums.items():
            drawn[name].append(_figures(asked[name], [counts @ part for part in parts]))
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, value in values.items():
        known = np.concatenate(drawn[name])
        low, high = np.quantile(known[np.isfinite(known)], [tail, 1 - tail])
        found[name] = Interval(float(value), float(low), float(high))
    return found


def _by_cluster(tally: Tally, clusters: Sequence[Hashable]) -> Float64:
    return np.stack([cluster_sums(column, clusters) for column in tally.counts.T], axis=1)


def _figures(pair: tuple[Tally, Tally | None], sums: Sequence[Float64]) -> Float64:
    own, reference = pair
    value = own.combine(sums[0])
    return value if reference is None else value - reference.combine(sums[1])
