"""Bounds of proportions: exact for one sample, Tango's score interval for paired ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exporter.compare.statistics import Interval, binomial_cdf, clopper_pearson, cluster_sums

# Both one-sided 95 per cent bounds together are a two-sided interval of 90 per cent.
ONE_SIDED = 0.95
BOTH_SIDES = 2 * ONE_SIDED - 1
STEPS = 60


def normal_quantile(probability: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(probability)


def tango_score(
    gained: ArrayLike, lost: ArrayLike, pairs: ArrayLike, difference: ArrayLike
) -> NDArray[np.float64]:
    """Tango's score statistic of H0: P(gained) - P(lost) = `difference` (Tango 1998, eq. 6).

    `gained` and `lost` are the two kinds of discordant pairs among `pairs`; arrays broadcast. It
    falls as `difference` rises. Counts need not be whole: effective counts are allowed.
    """
    b, c, n, d = (np.asarray(v, dtype=np.float64) for v in (gained, lost, pairs, difference))
    # The maximum likelihood estimate of P(lost) under H0 is the larger root of a quadratic.
    linear = -b - c + (2 * n - b + c) * d
    root = np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0.0))
    chance = (root - linear) / (4 * n)
    variance = n * (2 * chance + d * (1 - d))
    with np.errstate(divide="ignore", invalid="ignore"):
        score = (b - c - n * d) / np.sqrt(np.maximum(variance, 0.0))
    result: NDArray[np.float64] = np.where(b - c - n * d == 0, 0.0, score)
    return result


def tango_bounds(
    gained: ArrayLike, lost: ArrayLike, pairs: ArrayLike, confidence: float = BOTH_SIDES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tango's score interval of P(gained) - P(lost), two-sided at `confidence`; arrays broadcast.

    Unlike Wald's it neither leaves -1..1 nor shrinks to a point without discordant pairs, where it
    is +-z^2 / (n + z^2). Raises ValueError for counts that cannot be.
    """
    b, c, n = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (gained, lost, pairs)))
    if (n <= 0).any() or (b < 0).any() or (c < 0).any() or (b + c > n * (1 + 1e-12)).any():
        raise ValueError("discordant pairs must be 0 or more and at most the pairs")
    z = normal_quantile((1 + confidence) / 2)
    estimate = (b - c) / n
    low = _bisect(b, c, n, z, np.full_like(n, -1.0), estimate)
    high = _bisect(b, c, n, -z, estimate, np.full_like(n, 1.0))
    return np.where(c >= n, -1.0, low), np.where(b >= n, 1.0, high)


def _bisect(
    b: NDArray[np.float64],
    c: NDArray[np.float64],
    n: NDArray[np.float64],
    target: float,
    low: NDArray[np.float64],
    high: NDArray[np.float64],
) -> NDArray[np.float64]:
    for _ in range(STEPS):
        middle = (low + high) / 2
        above = tango_score(b, c, n, middle) > target
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return (low + high) / 2


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact McNemar p value: equal chances for both kinds of discordant pairs."""
    if gained < 0 or lost < 0:
        raise ValueError(f"{gained} and {lost} discordant pairs")
    return min(1.0, 2 * binomial_cdf(min(gained, lost), gained + lost, 0.5))


@dataclass(frozen=True)
class Clustered:
    """Images as if independent: `design_effect` says how many images count as one."""

    images: int
    clusters: int
    design_effect: float

    @property
    def effective(self) -> float:
        """Independent images that know as much as these (Korn and Graubard 1998)."""
        return self.images / self.design_effect


def design_effect(values: Sequence[float], clusters: Sequence[Hashable]) -> Clustered:
    """How much the images of one patient repeat each other, for the mean of `values`.

    Variance of the mean over clusters (ratio estimator) by that of as many independent images
    (Kish 1965), never below 1: luck in the sample must not make it larger than it is. Values that do
    not vary say nothing about it: 1.
    """
    images = len(values)
    sums = cluster_sums(values, clusters)
    groups = len(sums)
    spread = np.asarray(values, dtype=np.float64)
    if groups < 2 or not spread.var():
        return Clustered(images, groups, 1.0)
    plain = float(spread.var(ddof=1)) / images
    counts = cluster_sums([1.0] * images, clusters)
    mean = float(spread.mean())
    between = groups / (groups - 1) * float(((sums - mean * counts) ** 2).sum()) / images**2
    return Clustered(images, groups, max(1.0, between / plain))


def rate_bounds(
    events: Sequence[bool], clusters: Sequence[Hashable], confidence: float = BOTH_SIDES
) -> Interval:
    """Exact interval of a share of images, widened where a patient's images are alike.

    Clopper-Pearson on the effective number of images, rounded against the tested model.
    """
    values = [float(e) for e in events]
    found = design_effect(values, clusters)
    happened, share = sum(events), found.effective / found.images
    trials = max(1, floor(found.effective))
    high = clopper_pearson(min(trials, ceil(happened * share - 1e-9)), trials, confidence).high
    low = clopper_pearson(min(trials, floor(happened * share + 1e-9)), trials, confidence).low
    return Interval(happened / found.images, low, high)


def paired_bounds(
    own: Sequence[bool],
    reference: Sequence[bool],
    clusters: Sequence[Hashable],
    confidence: float = BOTH_SIDES,
) -> Interval:
    """Tango's interval of the share in `own` less that in `reference`, on effective counts."""
    difference = [float(a) - float(b) for a, b in zip(own, reference, strict=True)]
    found = design_effect(difference, clusters)
    gained = sum(d > 0 for d in difference) / found.design_effect
    lost = sum(d < 0 for d in difference) / found.design_effect
    low, high = tango_bounds(gained, lost, found.effective, confidence)
    return Interval(sum(difference) / found.images, float(low), float(high))
