"""Bounds and sizes of the gate against published tables and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from exporter.compare.bootstrap import few_bounds, ratio_bounds, studentised_bounds
from exporter.compare.power import (
    cases_for_mean,
    images_for_observed_rate,
    images_for_rate,
    pairs_for_difference,
    power_of_mean,
)
from exporter.compare.proportions import (
    design_effect,
    mcnemar_exact,
    paired_bounds,
    rate_bounds,
    tango_bounds,
    tango_score,
)


def test_tangos_own_example() -> None:
    # Tango 1998, section 5: 44 pairs of lenses, one discordant; margin 0.1: Z = 1.709, 90 per cent
    # limits -0.096 and 0.037.
    assert float(tango_score(0, 1, 44, -0.1)) == pytest.approx(1.709, abs=5e-4)
    low, high = tango_bounds(0, 1, 44, 0.90)
    assert (round(float(low), 3), round(float(high), 3)) == (-0.096, 0.037)


def test_fagerlands_table() -> None:
    # Fagerland, Lydersen and Laake 2014: airway hyper-responsiveness, 1 and 7 discordant of 21.
    low, high = tango_bounds(1, 7, 21, 0.95)
    assert (round(float(low), 3), round(float(high), 3)) == (-0.517, -0.026)


@pytest.mark.parametrize("n", [1, 20, 44, 240])
def test_tango_without_discordant_pairs_has_a_closed_form(n: int) -> None:
    z = stats.norm.ppf(0.95)
    low, high = tango_bounds(0, 0, n)
    assert float(high) == pytest.approx(z**2 / (n + z**2), abs=1e-9)
    assert float(low) == pytest.approx(-float(high), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 100))
def test_tango_limits_solve_the_likelihood(b: int, c: int, rest: int) -> None:
    n = b + c + rest
    if n in (0, b, c):
        return
    low, high = (float(x) for x in tango_bounds(b, c, n, 0.95))
    assert -1 <= low <= (b - c) / n <= high <= 1
    mirrored = tango_bounds(c, b, n, 0.95)
    assert (-float(mirrored[1]), -float(mirrored[0])) == pytest.approx((low, high), abs=1e-9)
    for limit in (low, high):
        # The restricted maximum likelihood estimate, found by a search instead of the quadratic.
        lowest, highest = max(0.0, -limit), (1 - limit) / 2

        def unlikely(p21: float, d: float = limit) -> float:
            p = np.clip([p21 + d, p21, 1 - d - 2 * p21], 1e-300, None)
            return -float(b * np.log(p[0]) + c * np.log(p[1]) + (n - b - c) * np.log(p[2]))

        found = optimize.minimize_scalar(
            unlikely, bounds=(lowest, highest), method="bounded", options={"xatol": 1e-12}
        )
        variance = n * (2 * found.x + limit * (1 - limit))
        assert abs(b - c - n * limit) / np.sqrt(variance) == pytest.approx(1.96, abs=5e-3)


def test_impossible_counts_are_refused() -> None:
    for counts in ((1, 1, 1), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="discordant"):
            tango_bounds(*counts)
    with pytest.raises(ValueError, match="discordant"):
        mcnemar_exact(-1, 2)


@pytest.mark.parametrize(("b", "c"), [(1, 7), (0, 0), (5, 5), (0, 9), (40, 20)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(min(1.0, expected))


def test_sizes_of_paired_proportions() -> None:
    sizes = [pairs_for_difference(d, m) for m in (0.01, 0.02) for d in (0.02, 0.05)]
    assert sizes == [1237, 3092, 310, 773]


def test_size_of_a_mean_and_its_power() -> None:
    assert cases_for_mean(0.10, 0.01) == 619
    assert power_of_mean(619, 0.10, 0.01) == pytest.approx(0.8, abs=2e-3)
    assert power_of_mean(619, 0.10, 0.01, difference=-0.01) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="not within"):
        cases_for_mean(0.1, 0.01, difference=-0.01)


@pytest.mark.parametrize(
    ("margin", "events", "images"),
    [(0.01, 0, 299), (0.01, 1, 473), (0.01, 3, 773), (0.02, 0, 149), (0.02, 1, 236), (0.02, 3, 386)],
)  # fmt: skip
def test_sizes_of_the_zero_flip_rule(margin: float, events: int, images: int) -> None:
    assert images_for_rate(events, margin) == images
    assert (
        stats.binom.cdf(events, images, margin)
        <= 0.05
        < stats.binom.cdf(events, images - 1, margin)
    )


def test_fifty_images_miss_a_two_per_cent_rate_every_third_time() -> None:
    assert stats.binom.pmf(0, 50, 0.02) == pytest.approx(0.364, abs=1e-3)
    assert rate_bounds([False] * 50, range(50)).high > 0.02


def test_sizes_from_what_was_seen() -> None:
    assert images_for_observed_rate(0.0, 20, 0.02) == 149
    assert images_for_observed_rate(0.02, 100, 0.02) is None
    count = images_for_observed_rate(0.01, 100, 0.02)
    assert count is not None
    assert rate_bounds([i < count // 100 for i in range(count)], range(count)).high <= 0.02


def test_a_patient_with_many_images_does_not_count_as_many_patients() -> None:
    alone = [i % 10 == 0 for i in range(300)]
    together = [i // 3 % 10 == 0 for i in range(300)]
    patients = [i // 3 for i in range(300)]
    assert design_effect([float(x) for x in together], patients).design_effect == pytest.approx(
        3, rel=0.02
    )
    assert design_effect([float(x) for x in alone], range(300)).design_effect == pytest.approx(
        1, rel=0.01
    )
    exact = stats.binomtest(30, 300).proportion_ci(0.90, method="exact")
    found = rate_bounds(alone, range(300))
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
    wider = rate_bounds(together, patients)
    assert wider.low < found.low < found.high < wider.high
    same = [False] * 300
    narrow, wide = paired_bounds(alone, same, range(300)), paired_bounds(together, same, patients)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_studentised_bounds_of_independent_values_are_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(0.3, 1.0, (1, 300))
    low, high = studentised_bounds(values, np.ones_like(values))
    expected = stats.t.interval(0.90, 299, values.mean(), stats.sem(values[0]))
    assert (low[0], high[0]) == pytest.approx(expected, abs=6e-3)


def test_a_ratio_that_is_the_same_everywhere_has_no_spread() -> None:
    found = ratio_bounds([0.011] * 240, [11.0] * 240, [i // 3 for i in range(240)])
    assert (found.low, found.high) == pytest.approx((0.001, 0.001))


def test_bounds_where_nearly_nothing_changed() -> None:
    patients = [i // 3 for i in range(240)]
    still = ratio_bounds([0.0] * 240, [5.0] * 240, patients, unit=1.0)
    assert still.value == 0
    # 80 patients without a loss: the exact bound is 1 - 0.05^(1/80) of them, one fact each.
    assert still.low == pytest.approx(-80 * (1 - 0.05 ** (1 / 80)) / 1200)
    assert still.high == -still.low
    one = ratio_bounds([-2.0] + [0.0] * 239, [5.0] * 240, patients, unit=1.0)
    assert one.low < still.low < one.value < 0
    assert one.low == pytest.approx(-2 * 80 * stats.beta.ppf(0.95, 2, 79) / 1200, rel=1e-6)
    assert few_bounds(np.zeros(5), 10.0, 0.0) == (0.0, 0.0)
    alone = ratio_bounds([1.0, 2.0], [1.0, 1.0], ["p", "p"])
    assert (alone.low, alone.high) == (-float("inf"), float("inf"))
    with pytest.raises(ValueError, match="denominators"):
        ratio_bounds([1.0], [0.0], ["p"])
