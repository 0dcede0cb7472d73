"""Figures that are no means, as means over cases: then the bootstrap over patients serves them all.

A smooth figure F of a sample differs from its true value by the mean of its influence over cases, to
the order of 1 / cases. F plus that influence is a pseudo-value for each case; the mean of the
pseudo-values is F exactly, and the difference of two models' pseudo-values of the same case is paired.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exporter.compare.decide import Margin, Sums, mean, paired_share
from exporter.compare.quality.trust import BINS
from exporter.compare.records import Figure
from exporter.compare.statistics import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Interval,
    bootstrap_ratio,
    cluster_sums,
)
from exporter.compare.verdict import Quantity

Float64 = NDArray[np.float64]
# Draws of up to so many counts are kept, one byte each.
KEPT = 200_000_000


def auroc_values(scores: ArrayLike, positive: ArrayLike, used: ArrayLike | None = None) -> Float64:
    """Pseudo-values of the area under the ROC curve, one per case; ties count half.

    From the structural components of DeLong et al. 1988; summed over a patient's cases their variance
    is that of Obuchowski 1997 for clustered data. Cases that are not `used` have no influence. Raises
    ValueError unless there are both positives and negatives among the used.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    known = np.ones(len(values), dtype=bool) if used is None else np.asarray(used, dtype=bool)
    hits, misses = np.flatnonzero(truth & known), np.flatnonzero(~truth & known)
    if not len(hits) or not len(misses) or not np.isfinite(values[known]).all():
        raise ValueError(
            f"{len(hits)} positives and {len(misses)} negatives; expected some of both, all finite"
        )
    won = _below(values[hits], values[misses])
    lost = 1.0 - _below(values[misses], values[hits])
    area = float(won.mean())
    pseudo = np.full(len(values), area)
    pseudo[hits] += (won - area) * len(values) / len(hits)
    pseudo[misses] += (lost - area) * len(values) / len(misses)
    return pseudo


def _below(values: Float64, others: Float64) -> Float64:
    """Share of `others` that lie below each value, ties half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    share: Float64 = (left + right) / (2 * len(others))
    return share


def calibration_values(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> Float64:
    """One value per prediction whose mean is the expected calibration error (`trust.calibration_error`).

    A prediction counts with the sign of its bin's gap; the signs are taken as known, which they are
    where no bin's gap is near zero.
    """
    scores = np.asarray(confidence, dtype=np.float64)
    gap = np.asarray(correct, dtype=np.float64) - scores
    place = np.digitize(scores, np.linspace(0.0, 1.0, bins + 1)[1:-1], right=True)
    signs = np.sign(np.bincount(place, gap, bins))
    values: Float64 = signs[place] * gap
    return values


def ratio_values(tops: ArrayLike, bottoms: ArrayLike) -> Float64:
    """Pseudo-values of sum(tops) / sum(bottoms), one per case. Raises ValueError for a sum of zero."""
    top, bottom = np.asarray(tops, dtype=np.float64), np.asarray(bottoms, dtype=np.float64)
    whole = float(bottom.sum())
    if whole <= 0:
        raise ValueError("the denominators sum to zero")
    ratio = float(top.sum()) / whole
    pseudo: Float64 = ratio + (top - ratio * bottom) * len(top) / whole
    return pseudo


def means(values: ArrayLike, patients: Sequence[Hashable]) -> Sums:
    """Values of which every case counts once."""
    tops = np.asarray(values, dtype=np.float64)
    return Sums(tops.tolist(), [1.0] * len(tops), patients)


def less(own: Sums, reference: Sums) -> Sums:
    """The paired difference of two figures with the same denominators."""
    if list(own.bottoms) != list(reference.bottoms):
        raise ValueError("the denominators differ; expected a figure of the same cases")
    tops = [a - b for a, b in zip(own.tops, reference.tops, strict=True)]
    return Sums(tops, own.bottoms, own.patients)


def figure(sums: Sums) -> Figure:
    """Value and 95 per cent interval by the bootstrap over patients; the cases that count."""
    interval = bootstrap_interval(sums)
    return as_figure(interval, [p for p, b in zip(sums.patients, sums.bottoms, strict=True) if b])


def bootstrap_interval(sums: Sums) -> Interval:
    """`statistics.bootstrap_ratio`, its draws kept: a comparison has hundreds of figures."""
    groups = len(set(sums.patients))
    if groups < 2 or groups * RESAMPLES > KEPT:
        return bootstrap_ratio(sums.tops, sums.bottoms, sums.patients)
    top, bottom = (cluster_sums(side, sums.patients) for side in (sums.tops, sums.bottoms))
    if bottom.sum() <= 0:
        raise ValueError("nothing to average: the denominators sum to zero")
    ratios = []
    for part in _draws(groups):
        drawn = part.astype(np.float64)
        below = drawn @ bottom
        ratios.append((drawn @ top)[below > 0] / below[below > 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))


@lru_cache(maxsize=1)
def _draws(groups: int) -> tuple[NDArray[np.uint8], ...]:
    """Clusters drawn with replacement, as counts ``[resamples, groups]`` in parts."""
    rng = np.random.default_rng(SEED)
    # The parts of `bootstrap_ratio`, so that the same numbers are drawn. A group is drawn once in the
    # mean: no count comes near 255.
    step = max(1, 20_000_000 // groups)
    even = np.full(groups, 1 / groups)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    parts = [rng.multinomial(groups, even, size=size) for size in sizes]
    return tuple(part.astype(np.uint8) for part in parts)


@dataclass(frozen=True)
class Paired:
    """One figure of a model and of the reference on the same cases.

    margin: of the difference, where it is gated; unit: the least that one case can change (one fact;
    0: figures that move by any amount); share: a share of cases, each of which is 0 or 1.
    """

    name: str
    own: Sums
    base: Sums
    margin: Margin | None = None
    unit: float = 0.0
    share: bool = False

    @property
    def figure(self) -> Figure:
        """The model's figure with its interval."""
        return figure(self.own)

    @property
    def difference(self) -> Figure:
        """The model minus the reference, with its interval."""
        return figure(less(self.own, self.base))

    def quantity(self) -> Quantity:
        """The verdict on the difference. Raises ValueError where it is not gated."""
        if self.margin is None:
            raise ValueError(f"'{self.name}' has no margin")
        now, before = (sum(s.tops) / sum(s.bottoms) for s in (self.own, self.base))
        said = f"{now:.4f} against {before:.4f}"
        if self.share:
            own, base = ([top > 0 for top in s.tops] for s in (self.own, self.base))
            return paired_share(self.name, own, base, self.own.patients, self.margin, said)
        difference = less(self.own, self.base)
        return mean(self.name, difference, self.margin, said, unit=self.unit)


def as_figure(interval: Interval, patients: Sequence[Hashable]) -> Figure:
    """An interval as a figure; bounds that are not finite are None."""
    low, high = (b if np.isfinite(b) else None for b in (interval.low, interval.high))
    return Figure(interval.value, low, high, len(patients), len(set(patients)))


def plain(value: float, patients: Sequence[Hashable]) -> Figure:
    """A figure without an interval, such as a worst case."""
    return Figure(value, None, None, len(patients), len(set(patients)))
