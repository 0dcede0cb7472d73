"""How many cases a decision needs, and how likely a gate is to reach it."""

from __future__ import annotations

from math import ceil, sqrt
from statistics import NormalDist

from exporter.catalog.schema import Gate
from exporter.compare.proportions import ONE_SIDED, normal_quantile, tango_score
from exporter.compare.statistics import binomial_cdf

POWER = 0.8
# Beyond this many images "more than" is the answer.
MOST = 1_000_000


def pairs_for_difference(discordant: float, margin: float, difference: float = 0.0) -> int:
    """Pairs that show, with `POWER`, that a paired share falls by less than `margin`.

    `discordant` is the share of pairs where the two differ, `difference` the true one (a fall is
    negative): n = (z_alpha + z_beta)^2 (discordant - difference^2) / (margin + difference)^2, one-
    sided, Wald's variance: the published tables. `tango_pairs` is what the gate needs. Raises ValueError when the difference lies at or beyond the margin.
    """
    return cases_for_mean(sqrt(max(discordant - difference**2, 0.0)), margin, difference)


def tango_pairs(discordant: float, margin: float, difference: float = 0.0) -> int:
    """As `pairs_for_difference`, for Tango's score bound: n of Nam 1997.

    The score test takes its variance at the margin, which for few discordant pairs is larger than
    the true one: n = ((z_alpha s0 + z_beta s1) / (margin + difference))^2. Raises ValueError alike.
    """
    if margin + difference <= 0:
        raise ValueError(f"a difference of {difference} is not within a margin of {margin}")
    low, high = 1, 2
    while tango_power(high, discordant, margin, difference) < POWER:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = tango_power(middle, discordant, margin, difference) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def tango_power(pairs: int, discordant: float, margin: float, difference: float = 0.0) -> float:
    """Chance that Tango's one-sided bound of so many pairs lies inside the margin (Nam 1997)."""
    gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
    room = margin + difference
    # The statistic of the expected counts of one pair is room / s0.
    null = room / float(tango_score(gained, lost, 1.0, -margin))
    true = sqrt(discordant - difference**2)
    shift = room * sqrt(pairs) - normal_quantile(ONE_SIDED) * null
    return NormalDist().cdf(shift / true)


def cases_for_mean(deviation: float, margin: float, difference: float = 0.0) -> int:
    """Independent cases that show, with `POWER`, that a mean falls by less than `margin`.

    `deviation` is the standard deviation of the paired differences. Raises ValueError when the true
    `difference` lies at or beyond the margin: no number of cases shows what is not so.
    """
    room = margin + difference
    if room <= 0:
        raise ValueError(f"a difference of {difference} is not within a margin of {margin}")
    reach = normal_quantile(ONE_SIDED) + normal_quantile(POWER)
    return max(1, ceil((reach * deviation / room) ** 2 - 1e-9))


def power_of_mean(cases: int, deviation: float, margin: float, difference: float = 0.0) -> float:
    """Chance that the one-sided bound of so many cases lies inside the margin."""
    shift = (margin + difference) * sqrt(cases) / deviation
    return NormalDist().cdf(shift - normal_quantile(ONE_SIDED))


def images_for_rate(events: int, margin: float) -> int:
    """Images of which at most `events` show, at 95 per cent, a rate under `margin` (exact).

    The smallest n with P(X <= events; n, margin) <= 0.05: 149 without an event at 2 per cent.
    """
    low, high = events, max(events + 1, 2)
    while binomial_cdf(events, high, margin) > 1 - ONE_SIDED:
        low, high = high, 2 * high
        if high > MOST:
            return MOST
    while high - low > 1:
        middle = (low + high) // 2
        if binomial_cdf(events, middle, margin) > 1 - ONE_SIDED:
            low = middle
        else:
            high = middle
    return high


def images_for_observed_rate(rate: float, images: int, margin: float) -> int | None:
    """Images that would show a rate under `margin` if it goes on as seen; None when it cannot.

    Searched upwards from `images` in steps of a twentieth, with the events expected at `rate`.
    """
    if rate >= margin:
        return None
    count = images
    while count < MOST:
        need = images_for_rate(ceil(rate * count - 1e-9), margin)
        if need <= count:
            return count
        count = max(count + 1, min(need, count + max(1, count // 20)))
    return None


def size_line(gate: Gate) -> str:
    """How many images the gate's margins need, in words, for the report."""
    zero = images_for_rate(0, gate.flip_rate)
    small, large = (tango_pairs(share, gate.contradiction_rise) for share in (0.02, 0.05))
    smooth = cases_for_mean(0.10, gate.rouge1_loss)
    return (
        f"{zero} images without a flip show a rate under {100 * gate.flip_rate:g} %; without a true "
        f"difference, and with 2 % (5 %) of the images judged differently, {small} ({large}) images "
        f"show with a power of {100 * POWER:g} % that a share rises by less than "
        f"{100 * gate.contradiction_rise:g} points; a ROUGE-1 whose differences have a standard "
        f"deviation of 0.10 needs {smooth}"
    )
