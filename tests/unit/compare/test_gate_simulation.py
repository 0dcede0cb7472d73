"""2,000 simulated gates: a candidate exactly at the margin passes in at most 5 of 100.

Seeds are fixed, so that a run repeats itself; each claim is held against the exact binomial interval of
its own 2,000 runs. `pytest -s` prints the rates.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from exporter.compare.bootstrap import FEW, few_bounds, studentised_bounds
from exporter.compare.power import (
    cases_for_mean,
    images_for_rate,
    pairs_for_difference,
    tango_pairs,
    tango_power,
)
from exporter.compare.proportions import tango_bounds

GATES = 2_000
Arrays = tuple[NDArray[np.float64], NDArray[np.float64]]


def interval(passes: int, what: str) -> tuple[float, float, float]:
    """Rate and exact 95 per cent interval, printed."""
    exact = stats.binomtest(passes, GATES).proportion_ci(0.95, method="exact")
    rate = passes / GATES
    print(f"\n{what}: {100 * rate:.2f} % [{100 * exact.low:.2f}, {100 * exact.high:.2f}]")
    return rate, exact.low, exact.high


def discordant(
    rng: np.random.Generator, pairs: int, share: float, difference: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts (gained, lost) of `GATES` experiments."""
    gained, lost = (share + difference) / 2, (share - difference) / 2
    drawn = rng.multinomial(pairs, [gained, lost, 1 - share], size=GATES)
    return drawn[:, 0], drawn[:, 1]


@pytest.mark.parametrize(("pairs", "share", "margin"), [(240, 0.06, 0.02), (1237, 0.03, 0.01)])
def test_paired_proportions_at_the_margin(pairs: int, share: float, margin: float) -> None:
    gained, lost = discordant(np.random.default_rng(11), pairs, share, -margin)
    low, _ = tango_bounds(gained, lost, pairs)
    _, least, _ = interval(int((low >= -margin).sum()), f"Tango at margin {margin}, {pairs} pairs")
    assert least <= 0.05


@pytest.mark.parametrize(
    ("share", "margin"), [(0.02, 0.01), (0.05, 0.01), (0.02, 0.02), (0.05, 0.02)]
)
def test_power_of_paired_proportions_is_the_formulas(share: float, margin: float) -> None:
    for pairs in (pairs_for_difference(share, margin), tango_pairs(share, margin)):
        gained, lost = discordant(np.random.default_rng(12), pairs, share, 0.0)
        low, _ = tango_bounds(gained, lost, pairs)
        rate, _, _ = interval(int((low >= -margin).sum()), f"Tango's power, {pairs} pairs")
        # Counts are whole: with six discordant pairs the power moves in steps of some points.
        assert rate == pytest.approx(tango_power(pairs, share, margin), abs=0.05)
    assert tango_power(tango_pairs(share, margin), share, margin) >= 0.8


@pytest.mark.parametrize(("images", "margin"), [(149, 0.02), (240, 0.02), (473, 0.01)])
def test_a_flip_rate_at_the_margin(images: int, margin: float) -> None:
    flips = np.random.default_rng(13).binomial(images, margin, GATES)
    most = max(k for k in range(20) if images_for_rate(k, margin) <= images)
    rate, _, _ = interval(int((flips <= most).sum()), f"flips at {margin}, {images} images")
    assert rate <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / GATES)
    assert stats.binom.cdf(most, images, margin) <= 0.05


def everywhere(rng: np.random.Generator, patients: int, loss: float) -> Arrays:
    """Each of about five facts on three images is lost or gained on its own."""
    facts = rng.integers(3, 8, (GATES, patients, 3))
    net = rng.binomial(facts, 0.03) - rng.binomial(facts, 0.03 + loss)
    return net.sum(2).astype(float), facts.sum(2).astype(float)


def whole_images(rng: np.random.Generator, patients: int, loss: float) -> Arrays:
    """Rare images lose two facts each."""
    facts = rng.integers(3, 8, (GATES, patients, 3))
    hit = rng.random(facts.shape) < loss * 5 / 2
    return -(2 * hit).sum(2).astype(float), facts.sum(2).astype(float)


def whole_patients(rng: np.random.Generator, patients: int, loss: float) -> Arrays:
    """Rare patients lose nearly a third of all their facts."""
    facts = rng.integers(3, 8, (GATES, patients, 3)).sum(2).astype(float)
    hit = rng.random(facts.shape) < loss / 0.3
    return np.where(hit, -0.3 * facts, 0.0), facts


def lower_bounds(tops: NDArray[np.float64], bottoms: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `ratio_bounds` decides, for many data sets at once and with 1,000 resamples."""
    low, _ = studentised_bounds(tops, bottoms, 1_000)
    for index in np.flatnonzero(np.count_nonzero(tops, axis=1) < FEW):
        low[index], _ = few_bounds(tops[index], float(bottoms[index].sum()), 1.0)
    return low


@pytest.mark.parametrize("patients", [80, 149])
@pytest.mark.parametrize("world", [everywhere, whole_images, whole_patients])
def test_facts_lost_at_the_margin(
    patients: int, world: Callable[[np.random.Generator, int, float], Arrays]
) -> None:
    tops, bottoms = world(np.random.default_rng(14), patients, 0.02)
    passed = int((lower_bounds(tops, bottoms) >= -0.02).sum())
    _, least, _ = interval(
        passed, f"bootstrap at the margin, {world.__name__}, {patients} patients"
    )
    assert least <= 0.05


def test_power_of_the_bootstrap_is_the_formulas() -> None:
    cases = cases_for_mean(0.10, 0.02)
    values = np.random.default_rng(15).normal(0.0, 0.10, (GATES, cases))
    low, _ = studentised_bounds(values, np.ones_like(values), 1_000)
    rate, _, _ = interval(int((low >= -0.02).sum()), f"bootstrap's power, {cases} cases")
    assert rate == pytest.approx(0.8, abs=0.03)


def test_a_gate_of_several_quantities_needs_no_correction() -> None:
    # One quantity at its margin, two others harmless: all must pass, so it passes more seldom still.
    rng = np.random.default_rng(16)
    gained, lost = discordant(rng, 240, 0.06, -0.02)
    good, worse = discordant(rng, 240, 0.01, 0.0)
    flips = rng.binomial(240, 0.001, GATES)
    passed = (
        (tango_bounds(gained, lost, 240)[0] >= -0.02)
        & (tango_bounds(good, worse, 240)[0] >= -0.02)
        & (flips <= 1)
    )
    rate, _, high = interval(int(passed.sum()), "whole gate, one quantity at its margin")
    assert rate <= 0.05
    assert high <= 0.07
