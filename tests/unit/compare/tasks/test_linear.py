"""Figures as means of pseudo-values, against closed forms, a full bootstrap and simulated gates."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from exporter.compare.bootstrap import ratio_bounds, studentised_bounds
from exporter.compare.decide import Sums
from exporter.compare.quality.trust import auroc, calibration_error
from exporter.compare.statistics import bootstrap_ratio
from exporter.compare.tasks.linear import (
    Paired,
    auroc_values,
    bootstrap_interval,
    calibration_values,
    figure,
    less,
    means,
    ratio_values,
)

Float64 = NDArray[np.float64]


def pairs_won(scores: Float64, positive: NDArray[np.bool_]) -> float:
    """The definition: over all pairs, a positive above a negative, ties half."""
    won = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    return float(np.mean(won))


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_the_mean_is_the_area_with_ties(digits: int) -> None:
    rng = np.random.default_rng(3)
    scores, positive = rng.normal(size=60).round(digits), rng.random(60) < 0.3
    values = auroc_values(scores, positive)
    assert values.mean() == pytest.approx(pairs_won(scores, positive), abs=1e-12)
    assert values.mean() == pytest.approx(auroc(scores, positive), abs=1e-12)


def test_their_variance_is_delongs() -> None:
    rng = np.random.default_rng(4)
    scores, positive = rng.normal(size=80).round(1), rng.random(80) < 0.4
    x, y = scores[positive], scores[~positive]
    # DeLong et al. 1988: the components over positives and negatives, their variances by number.
    above = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    v10, v01 = above.mean(1), above.mean(0)
    variance = ((v10 - v10.mean()) ** 2).sum() / len(x) ** 2 + (
        (v01 - v01.mean()) ** 2
    ).sum() / len(y) ** 2
    values = auroc_values(scores, positive)
    assert ((values - values.mean()) ** 2).sum() / 80**2 == pytest.approx(variance, rel=1e-12)


def test_cases_that_are_not_used_do_not_count() -> None:
    scores, positive = np.array([3.0, 1, 2, 9, 0]), np.array([1, 1, 0, 0, 0], bool)
    used = np.array([1, 1, 1, 0, 1], bool)
    values = auroc_values(scores, positive, used)
    assert values.mean() == pytest.approx(0.75)
    assert values[3] == pytest.approx(0.75)


@pytest.mark.parametrize("positive", [[1, 1], [0, 0]])
def test_one_side_alone_has_no_area(positive: list[int]) -> None:
    with pytest.raises(ValueError, match="some of both"):
        auroc_values([1.0, 2.0], positive)


def test_the_bounds_are_those_of_resampling_the_whole_figure() -> None:
    rng = np.random.default_rng(5)
    patients = np.repeat(np.arange(60), 3)
    positive = rng.random(180) < 0.4
    shared = rng.normal(size=60)[patients]
    base = positive + shared + rng.normal(size=180)
    own = base + 0.6 * rng.normal(size=180)
    difference = auroc_values(own, positive) - auroc_values(base, positive)
    found = ratio_bounds(difference.tolist(), [1.0] * 180, patients.tolist())
    groups = [np.flatnonzero(patients == p) for p in range(60)]
    whole = []
    for _ in range(1500):
        drawn = np.concatenate([groups[i] for i in rng.integers(60, size=60)])
        whole.append(auroc(own[drawn], positive[drawn]) - auroc(base[drawn], positive[drawn]))
    low, high = np.quantile(whole, [0.05, 0.95])
    assert found.value == pytest.approx(auroc(own, positive) - auroc(base, positive), abs=1e-12)
    # The percentile bootstrap of the whole figure: no closer than a seventh of the width is asked.
    width = high - low
    assert abs(found.low - low) < width / 7 and abs(found.high - high) < width / 7


def test_a_loss_at_the_margin_passes_in_five_of_a_hundred() -> None:
    """600 simulated gates: binormal scores whose area is truly lower by the margin."""
    rng, margin, sets, groups, each = np.random.default_rng(6), 0.02, 600, 80, 3
    area = stats.norm.cdf(1.2 / np.sqrt(2))
    # More noise on the same scores: the area falls to Phi(d / sqrt(2 (1 + v))).
    noise = (1.2 / stats.norm.ppf(area - margin)) ** 2 / 2 - 1
    tops = np.empty((sets, groups))
    for i in range(sets):
        positive = rng.random(groups * each) < 0.5
        base = 1.2 * positive + rng.normal(size=groups * each)
        own = base + np.sqrt(noise) * rng.normal(size=groups * each)
        change = auroc_values(own, positive) - auroc_values(base, positive)
        tops[i] = change.reshape(groups, each).sum(1)
    low, _ = studentised_bounds(tops, np.full((sets, groups), float(each)), resamples=2000)
    passes = int((low >= -margin).sum())
    print(f"\n{100 * passes / sets:.1f} % of {sets} gates passed a loss at the margin")
    assert stats.binomtest(passes, sets).proportion_ci(0.95).low <= 0.05
    assert 0.01 < passes / sets


def test_calibration_values_have_its_error_as_their_mean() -> None:
    rng = np.random.default_rng(7)
    confidence, correct = rng.random(300), rng.random(300) < 0.6
    values = calibration_values(confidence, correct)
    assert values.mean() == pytest.approx(calibration_error(confidence, correct), abs=1e-12)


def test_a_ratio_and_its_linearised_error() -> None:
    tops, bottoms = np.array([3.0, 0, 2, 5]), np.array([4.0, 1, 2, 9])
    values = ratio_values(tops, bottoms)
    assert values.mean() == pytest.approx(10 / 16)
    # Cochran 1977, 6.3, without the G / (G - 1).
    variance = ((tops - 10 / 16 * bottoms) ** 2).sum() / 16**2
    assert ((values - values.mean()) ** 2).sum() / 16 == pytest.approx(variance)
    with pytest.raises(ValueError, match="zero"):
        ratio_values([0.0], [0.0])


def test_figures_count_the_cases_that_have_them() -> None:
    found = figure(Sums([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], ["a", "b", "a"]))
    assert (found.value, found.images, found.patients) == (1.0, 2, 1)
    assert found.low == found.high == 1.0


@pytest.mark.parametrize("groups", [45, 2001], ids=["one part", "two parts"])
def test_kept_draws_change_nothing(groups: int) -> None:
    rng, count = np.random.default_rng(8), 2 * groups
    tops, bottoms = rng.normal(size=count), rng.random(count)
    patients = (np.arange(count) // 2).tolist()
    sums = Sums(tops.tolist(), bottoms.tolist(), patients)
    assert bootstrap_interval(sums) == bootstrap_ratio(tops, bottoms, patients)


def test_differences_need_the_same_cases() -> None:
    with pytest.raises(ValueError, match="same cases"):
        less(Sums([1.0], [1.0], ["a"]), Sums([1.0], [2.0], ["a"]))


def test_a_paired_share_is_judged_by_tango() -> None:
    own, base = [1.0] * 150 + [0.0] * 50, [1.0] * 200
    patients = [str(i) for i in range(200)]
    pair = Paired("recall", means(own, patients), means(base, patients), (-0.02, None), share=True)
    found = pair.quantity()
    assert found.verdict == "FAIL" and found.value == -0.25 and "Tango" in found.method
    assert found.said == "0.7500 against 1.0000"
    with pytest.raises(ValueError, match="no margin"):
        Paired("accuracy", pair.own, pair.base).quantity()
