"""From an interval and a margin to a verdict and the number of images that would decide."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import msgspec

from exporter.compare.bootstrap import ratio_bounds
from exporter.compare.power import MOST, images_for_observed_rate
from exporter.compare.proportions import (
    design_effect,
    paired_bounds,
    rate_bounds,
    tango_bounds,
)
from exporter.compare.statistics import Interval
from exporter.compare.verdict import Quantity, Verdict

TANGO = "Tango's score interval, effective pairs"
EXACT = "exact (Clopper-Pearson), effective images"
BOOTSTRAP = "studentised bootstrap over patients"
Margin = tuple[float | None, float | None]


def decide(interval: Interval, margin: Margin) -> Verdict:
    """PASS: both one-sided bounds inside; FAIL: the whole interval outside; else INCONCLUSIVE."""
    at_least, at_most = margin
    low = -float("inf") if at_least is None else at_least
    high = float("inf") if at_most is None else at_most
    if interval.low >= low and interval.high <= high:
        return "PASS"
    return "FAIL" if interval.high < low or interval.low > high else "INCONCLUSIVE"


def paired_share(
    name: str,
    own: Sequence[bool],
    reference: Sequence[bool],
    patients: Sequence[Hashable],
    margin: Margin,
    said: str,
) -> Quantity:
    """A paired difference of shares of images."""
    interval = paired_bounds(own, reference, patients)
    effect = design_effect([float(a) - float(b) for a, b in zip(own, reference, strict=True)],
                           patients).design_effect  # fmt: skip
    gained = sum(a and not b for a, b in zip(own, reference, strict=True)) / effect
    lost = sum(b and not a for a, b in zip(own, reference, strict=True)) / effect

    def at(images: float) -> Interval:
        scale = images / len(own)
        low, high = tango_bounds(gained * scale, lost * scale, images / effect)
        return Interval(interval.value, float(low), float(high))

    found = _quantity(name, interval, margin, patients, TANGO, said, share=True)
    return _with_size(found, lambda: _search(at, len(own), margin))


def rate(
    name: str, events: Sequence[bool], patients: Sequence[Hashable], at_most: float, said: str
) -> Quantity:
    """A share of images that must be small."""
    interval = rate_bounds(events, patients)
    images = len(events)

    def size() -> int | None:
        if interval.value < at_most:
            return images_for_observed_rate(interval.value, images, at_most)
        # Too many to pass if it goes on so: the number that would show the failure.
        return _search(lambda n: _scaled(interval, n / images), images, (None, at_most))

    found = _quantity(name, interval, (None, at_most), patients, EXACT, said, share=True)
    return _with_size(found, size)


@dataclass(frozen=True)
class Sums:
    """Numerators and denominators of a ratio, one pair per image, and whose image it is."""

    tops: Sequence[float]
    bottoms: Sequence[float]
    patients: Sequence[Hashable]


def mean(
    name: str,
    sums: Sums,
    margin: Margin,
    said: str,
    *,
    unit: float = 0.0,
    share: bool = False,
    shift: float = 0.0,
) -> Quantity:
    """A ratio of sums, plus `shift`, that must lie inside a margin; `unit` as in `ratio_bounds`."""
    bounds = ratio_bounds(sums.tops, sums.bottoms, sums.patients, unit=unit)
    interval = Interval(bounds.value + shift, bounds.low + shift, bounds.high + shift)
    images = len(sums.tops)

    def size() -> int | None:
        if not (isfinite(interval.low) and isfinite(interval.high)):
            return None
        return _search(lambda n: _scaled(interval, n / images), images, margin)

    found = _quantity(name, interval, margin, sums.patients, BOOTSTRAP, said, share=share)
    return _with_size(found, size)


def rule(name: str, broken: int, images: int, patients: int, said: str) -> Quantity:
    """Something that must not happen even once."""
    return Quantity(
        name, "FAIL" if broken else "PASS", float(broken), None, None, None, 0.0, False,
        images, patients, "counted: must not happen", said,
    )  # fmt: skip


def _quantity(
    name: str,
    interval: Interval,
    margin: Margin,
    patients: Sequence[Hashable],
    method: str,
    said: str,
    *,
    share: bool,
) -> Quantity:
    return Quantity(
        name=name,
        verdict=decide(interval, margin),
        value=interval.value,
        low=interval.low if isfinite(interval.low) else None,
        high=interval.high if isfinite(interval.high) else None,
        at_least=margin[0],
        at_most=margin[1],
        share=share,
        images=len(patients),
        patients=len(set(patients)),
        method=method,
        said=said,
    )


def _with_size(quantity: Quantity, size: Callable[[], int | None]) -> Quantity:
    """An inconclusive quantity with the number of images that would decide it."""
    if quantity.verdict != "INCONCLUSIVE":
        return quantity
    return msgspec.structs.replace(quantity, needed=size())


def _scaled(interval: Interval, factor: float) -> Interval:
    """The interval that `factor` times as many images would give, by the square root law."""
    root = factor**0.5
    below, above = interval.value - interval.low, interval.high - interval.value
    return Interval(interval.value, interval.value - below / root, interval.value + above / root)


def _search(at: Callable[[float], Interval], images: int, margin: Margin) -> int | None:
    """The smallest number of images, from those there are, at which `at` is decided."""
    high = images
    while decide(at(high), margin) == "INCONCLUSIVE":
        high *= 2
        if high > MOST:
            return None
    low = max(images, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        undecided = decide(at(middle), margin) == "INCONCLUSIVE"
        low, high = (middle, high) if undecided else (low, middle)
    return ceil(high)
