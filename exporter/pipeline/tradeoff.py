"""Choosing bits per unit to a budget, with the trade-off that the choice was made on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from exporter.compare.tradeoff import SCHEMA, Point, TradeOff
from exporter.core.errors import InputRefused
from exporter.core.progress import Progress, silent
from exporter.pipeline.budget import Budget
from exporter.quantizers.allocate import Assignment, Option, assign, best_within, hull
from exporter.quantizers.sensitivity import Bits
from exporter.quantizers.units import FLOAT16, UnitPlans

# Points of the curve that are measured, from the smallest choice up.
POINTS = 9
UNIT = "mean KL in nats per caption token on held-out calibration prompts"


@dataclass(frozen=True)
class Choice:
    """What was chosen. `probe_kl`: of matrices that were quantized one by one on the float model's
    inputs; `final_kl`: of the blocks quantized in order, as they are stored.
    """

    bits: dict[str, int]
    bytes: int
    predicted_kl: float
    probe_kl: float
    final_kl: float


class Chooser:
    """Finds the assignment for a budget; measures before it believes a prediction."""

    def __init__(self, plans: UnitPlans, budget: Budget) -> None:
        """Raises `InputRefused` when the size alone cannot be met."""
        self.plans, self.budget = plans, budget
        totals = {b: sum(p.bytes for p in plan) for b, plan in plans.by_bits.items()}
        self.float16_bytes, self.least_bytes = totals[FLOAT16], min(totals.values())
        self.uniform_bytes = sum(p.bytes for p in plans.uniform)
        self.limit = budget.limit(self.float16_bytes, self.uniform_bytes, self.least_bytes)
        self.points: list[Point] = []
        self._units: Sequence[Sequence[Option]] = ()
        self._kl: Callable[[Bits], float] = _unmeasured

    def measure(
        self,
        units: Sequence[Sequence[Option]],
        kl: Callable[[Bits], float],
        progress: Progress = silent,
    ) -> None:
        """Take the sensitivities, and measure points along their hull and the uniform choices."""
        self._units, self._kl = units, kl
        vertices = [v for v in hull(units) if v.kl > 0]
        shown = _spread(vertices, POINTS)
        uniform = {f"int{b}, all units": dict.fromkeys(self._names(), b) for b in self._low()}
        uniform["uniform int4"] = self.plans.bits_of(self.plans.uniform)
        for number, vertex in enumerate(shown):
            progress(number, len(shown) + len(uniform), "trade-off")
            self.points.append(self._point(f"hull {number + 1}", "hull", vertex))
        for number, (label, bits) in enumerate(uniform.items(), len(shown)):
            progress(number, len(shown) + len(uniform), f"trade-off, {label}")
            self.points.append(self._point(label, "uniform", self._assignment(bits)))

    def choose(self, quantize: Callable[[Bits], float]) -> Choice:
        """The choice for the budget. `quantize` makes the real blocks and measures the whole.

        Raises `InputRefused` when the measured KL stays above the budget.
        """
        if self.limit is not None:
            return self._to_size(self.limit, quantize)
        return self._to_kl(float(self.budget.kl or 0), quantize)

    def _to_size(self, limit: int, quantize: Callable[[Bits], float]) -> Choice:
        best = best_within(self._units, limit - self.plans.fixed_bytes)
        if best is None:
            raise ValueError(f"{limit} bytes were accepted and do not hold the smallest choice")
        tries = [best, self._assignment(self.plans.bits_of(self.plans.uniform))]
        fitting = [a for a in tries if a.bytes + self.plans.fixed_bytes <= limit]
        # The sum of sensitivities is a prediction: what was measured decides.
        chosen = min(fitting, key=lambda a: (self._measured(a), a.bytes))
        done = self._done(chosen, quantize)
        if self.budget.kl is not None and done.final_kl > self.budget.kl:
            raise InputRefused(
                f"--max-kl {self.budget.kl}: the best choice within --max-size "
                f"{self.budget.size.asked if self.budget.size else limit} has a measured KL of "
                f"{done.final_kl:.3g} nats; allow more of one of them"
            )
        return done

    def _to_kl(self, allowed: float, quantize: Callable[[Bits], float]) -> Choice:
        vertices = hull(self._units)
        low, target = 0, allowed
        while low < len(vertices):
            found = self._first_within(vertices, low, target)
            done = self._done(vertices[found], quantize)
            if done.final_kl <= allowed:
                return done
            # The blocks in order lost more than one by one: ask as much more of the latter.
            target = min(target, done.probe_kl) * allowed / done.final_kl
            low = found + 1
        raise InputRefused(
            f"--max-kl {allowed}: with the finest choice ({done.bytes / 1e6:.2f} MB) the measured KL "
            f"is {done.final_kl:.3g} nats; allow at least that"
        )

    def _first_within(self, vertices: Sequence[Assignment], low: int, allowed: float) -> int:
        """The smallest vertex from `low` on whose measured KL is allowed, by bisection; else the last."""
        high = len(vertices) - 1
        while low < high:
            middle = (low + high) // 2
            if self._measured(vertices[middle]) <= allowed:
                high = middle
            else:
                low = middle + 1
        return low

    def _done(self, chosen: Assignment, quantize: Callable[[Bits], float]) -> Choice:
        bits = self._bits(chosen)
        point = self._point("chosen", "chosen", chosen)
        return Choice(bits, point.bytes, point.predicted_kl, point.measured_kl, quantize(bits))

    def _point(
        self, label: str, kind: Literal["hull", "uniform", "chosen"], assignment: Assignment
    ) -> Point:
        size = assignment.bytes + self.plans.fixed_bytes
        return Point(label, kind, size, assignment.kl, self._measured(assignment))

    def _measured(self, assignment: Assignment) -> float:
        return self._kl(self._bits(assignment))

    def _bits(self, assignment: Assignment) -> dict[str, int]:
        picked = zip(self.plans.units, self._units, assignment.picks, strict=True)
        return {unit.name: options[pick].bits for unit, options, pick in picked}

    def _assignment(self, bits: Mapping[str, int]) -> Assignment:
        rows = zip(self.plans.units, self._units, strict=True)
        picks = [[o.bits for o in options].index(bits[unit.name]) for unit, options in rows]
        return assign(self._units, picks)

    def _names(self) -> list[str]:
        return [unit.name for unit in self.plans.units]

    def _low(self) -> list[int]:
        return [b for b in self.plans.choices if b != FLOAT16]


def record(
    chooser: Chooser, choice: Choice, units: Sequence[Sequence[Option]]
) -> dict[str, dict[str, Any]]:
    """What quantization.json says under "allocation", and tradeoff.json under "tradeoff"."""
    chosen = Point("chosen", "chosen", choice.bytes, choice.predicted_kl, choice.final_kl)
    allocation = {
        "budget": chooser.budget.to_json() | {"bytes": chooser.limit},
        "bytes": choice.bytes,
        "float16_bytes": chooser.float16_bytes,
        "uniform_bytes": chooser.uniform_bytes,
        "predicted_kl": choice.predicted_kl,
        "probe_kl": choice.probe_kl,
        "measured_kl": choice.final_kl,
        "units": [
            {
                "name": unit.name,
                "tensors": list(unit.tensors),
                "bits": choice.bits[unit.name],
                "options": [asdict(option) for option in options],
            }
            for unit, options in zip(chooser.plans.units, units, strict=True)
        ],
    }
    curve = TradeOff(SCHEMA, chooser.float16_bytes, UNIT, (*chooser.points, chosen))
    return {"allocation": allocation, "tradeoff": msgspec.to_builtins(curve)}


def _spread(vertices: Sequence[Assignment], count: int) -> list[Assignment]:
    """At most `count` vertices, the ends among them, with equally many left out between two."""
    if len(vertices) <= count:
        return list(vertices)
    last = len(vertices) - 1
    return [vertices[round(i * last / (count - 1))] for i in range(count)]


def _unmeasured(bits: Bits) -> float:
    raise ValueError(f"no meter for {len(bits)} units; call measure first")
