"""Which unit gets how many bits: a multiple-choice knapsack over bytes and predicted KL.

Each unit of a model can be stored in a few ways; the KL of the whole is predicted as the sum of the
units' own. The lower convex hull of all assignments (Kellerer, Pferschy and Pisinger, "Knapsack
Problems", 2004, chapter 11) is what a Lagrange multiplier on the bytes gives, and every vertex of it
is optimal for its own bytes. Between two vertices a search bounded by the hull finds the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# States kept for one unit in the search between two vertices; the best by their bound beyond it.
MOST_STATES = 50_000


@dataclass(frozen=True)
class Option:
    """One way to store a unit: `bits` (16: float16), its bytes, and the KL (nats) that it alone costs."""

    bits: int
    bytes: int
    kl: float


Units = Sequence[Sequence[Option]]


@dataclass(frozen=True)
class Assignment:
    """One option per unit: `picks` are indices into each unit's options."""

    picks: tuple[int, ...]
    bytes: int
    kl: float


@dataclass(frozen=True)
class _Step:
    """The next vertex of one unit's own hull: KL saved for bytes added."""

    unit: int
    pick: int
    bytes: int
    saved: float

    @property
    def slope(self) -> float:
        return self.saved / self.bytes


def assign(units: Units, picks: Sequence[int]) -> Assignment:
    """The assignment that takes option ``picks[i]`` of unit i, with its sums."""
    chosen = [options[p] for options, p in zip(units, picks, strict=True)]
    return Assignment(tuple(picks), sum(o.bytes for o in chosen), sum(o.kl for o in chosen))


def hull(units: Units) -> tuple[Assignment, ...]:
    """The vertices of the lower convex hull over all assignments, from the fewest bytes up.

    Raises ValueError when a unit has no option, or bytes or a KL that are not finite and positive.
    """
    _check(units)
    picks = [_vertices(options)[0] for options in units]
    found = [assign(units, picks)]
    for step in _steps(units):
        picks[step.unit] = step.pick
        found.append(assign(units, picks))
    return tuple(found)


def best_within(units: Units, limit: int) -> Assignment | None:
    """The least KL in at most `limit` bytes, fewer bytes when equal; None when nothing fits.

    Exact unless more than `MOST_STATES` partial assignments stay open; never worse than the largest
    vertex of `hull` that fits.
    """
    vertices = [v for v in hull(units) if v.bytes <= limit]
    if not vertices:
        return None
    best = _filled(units, vertices[-1], limit)
    order = sorted(range(len(units)), key=lambda u: -_spread(units[u]))
    rest = [_Rest([units[u] for u in order[i:]]) for i in range(1, len(order) + 1)]
    states = _States.start()
    for position, unit in enumerate(order):
        states = states.extended(units[unit])
        states = states.pruned(limit, best.kl, rest[position])
    if not states.bytes.size:
        return best
    found = [0] * len(units)
    for unit, pick in zip(order, states.picks[_least(states)], strict=True):
        found[unit] = int(pick)
    exact = assign(units, found)
    return min(best, exact, key=lambda a: (a.kl, a.bytes))


def _check(units: Units) -> None:
    for number, options in enumerate(units):
        if not options:
            raise ValueError(f"unit {number} has no options")
        for o in options:
            if o.bytes < 0 or not (np.isfinite(o.kl) and o.kl >= 0):
                raise ValueError(f"unit {number}: {o} is not an option with a size and a KL")


def _vertices(options: Sequence[Option]) -> list[int]:
    """Indices on one unit's lower convex hull, from the fewest bytes up."""
    ranked = sorted(range(len(options)), key=lambda i: (options[i].bytes, options[i].kl, i))
    kept: list[int] = []
    for i in ranked:
        if kept and options[i].kl >= options[kept[-1]].kl:
            continue
        while len(kept) > 1 and _above(options, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return kept


def _above(options: Sequence[Option], first: int, middle: int, last: int) -> bool:
    """Whether `middle` lies on or above the line between the others."""
    a, b, c = options[first], options[middle], options[last]
    return (a.kl - b.kl) * (c.bytes - a.bytes) <= (a.kl - c.kl) * (b.bytes - a.bytes)


def _steps(units: Units) -> list[_Step]:
    """Every step of every unit's hull, the most KL per byte first; within a unit in its order."""
    steps = []
    for unit, options in enumerate(units):
        kept = _vertices(options)
        for before, after in pairwise(kept):
            a, b = options[before], options[after]
            steps.append(_Step(unit, after, b.bytes - a.bytes, a.kl - b.kl))
    return sorted(steps, key=lambda s: (-s.slope, s.unit, s.bytes))


def _filled(units: Units, start: Assignment, limit: int) -> Assignment:
    """`start` with single exchanges that fit, each time the one that saves most."""
    picks, now = list(start.picks), start
    while True:
        tries = [
            (options[p].kl - o.kl, -o.bytes, unit, pick)
            for unit, (options, p) in enumerate(zip(units, picks, strict=True))
            for pick, o in enumerate(options)
            if o.kl < options[p].kl and now.bytes + o.bytes - options[p].bytes <= limit
        ]
        if not tries:
            return now
        _, _, unit, pick = max(tries)
        picks[unit] = pick
        now = assign(units, picks)


def _spread(options: Sequence[Option]) -> float:
    return max(o.kl for o in options) - min(o.kl for o in options)


class _Rest:
    """The least KL that units not yet decided can have in so many bytes, if options could be mixed."""

    def __init__(self, units: Units) -> None:
        vertices = hull(units)
        self._bytes = np.array([v.bytes for v in vertices], np.float64)
        self._kl = np.array([v.kl for v in vertices], np.float64)

    @property
    def least_bytes(self) -> float:
        return float(self._bytes[0])

    def bound(self, room: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.interp(room, self._bytes, self._kl)


@dataclass(frozen=True)
class _States:
    """Partial assignments: bytes and KL so far, and the picks ``[states, decided units]``."""

    bytes: NDArray[np.int64]
    kl: NDArray[np.float64]
    picks: NDArray[np.int8]

    @classmethod
    def start(cls) -> _States:
        return cls(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int8))

    def extended(self, options: Sequence[Option]) -> _States:
        """Each state with each option."""
        count = len(options)
        size = np.array([o.bytes for o in options], np.int64)
        loss = np.array([o.kl for o in options])
        added = np.tile(np.arange(count, dtype=np.int8), self.bytes.size)[:, None]
        return _States(
            (self.bytes[:, None] + size).ravel(),
            (self.kl[:, None] + loss).ravel(),
            np.concatenate([np.repeat(self.picks, count, axis=0), added], axis=1),
        )

    def pruned(self, limit: int, best: float, rest: _Rest) -> _States:
        """States that may still beat `best`: they fit, no other is as small and as good."""
        room = limit - self.bytes
        fits = np.flatnonzero(room >= rest.least_bytes)
        bounds = self.kl[fits] + rest.bound(room[fits])
        fits = fits[bounds < best * (1 + 1e-12)]
        ranked = fits[np.lexsort((self.kl[fits], self.bytes[fits]))]
        losses = self.kl[ranked]
        lowest = np.minimum.accumulate(np.concatenate([[np.inf], losses]))[:-1]
        kept = ranked[losses < lowest]
        if kept.size > MOST_STATES:
            bounds = self.kl[kept] + rest.bound(limit - self.bytes[kept])
            kept = kept[np.sort(np.argsort(bounds, kind="stable")[:MOST_STATES])]
        return _States(self.bytes[kept], self.kl[kept], self.picks[kept])


def _least(states: _States) -> int:
    return int(np.lexsort((states.bytes, states.kl))[0])
