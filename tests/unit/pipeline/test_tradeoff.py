"""Choosing to a budget with a made-up model whose KL is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from exporter.core.blocks import BlockFormat
from exporter.core.errors import InputRefused
from exporter.pipeline.budget import read_budget
from exporter.pipeline.tradeoff import Chooser, record
from exporter.quantizers.allocate import Option, hull
from exporter.quantizers.plan import LayerPlan
from exporter.quantizers.units import Unit, UnitPlans

UNITS = 8
SIZES = {4: 540, 8: 1020, 16: 2000}
NORM = LayerPlan("norm", "float", (50,), None, "none", "norm", 100)
COSTS = [2.0**-i for i in range(UNITS)]


def plan(bits: int) -> tuple[LayerPlan, ...]:
    fmt = None if bits == 16 else BlockFormat(bits, 32, symmetric=True)
    kind = "linear" if fmt else "float"
    rows = [
        LayerPlan(f"u{i}.w", kind, (10, 100), fmt, "rtn", "", SIZES[bits])  # type: ignore[arg-type]
        for i in range(UNITS)
    ]
    return (*rows, NORM)


def plans() -> UnitPlans:
    units = tuple(Unit(f"u{i}", (f"u{i}.w",), vision=False) for i in range(UNITS))
    return UnitPlans(units, {b: plan(b) for b in SIZES}, plan(4))


def real_kl(bits: Mapping[str, int], factor: float = 1.0) -> float:
    """Costs of the units add up, and the whole is `factor` times as bad as predicted."""
    each = {4: 1.0, 8: 0.01, 16: 0.0}
    return factor * sum(each[bits.get(f"u{i}", 16)] * COSTS[i] for i in range(UNITS))


def options() -> list[list[Option]]:
    return [
        [Option(b, SIZES[b], real_kl({f"u{i}": b})) for b in sorted(SIZES)] for i in range(UNITS)
    ]


def chooser(
    size: str | None, kl: float | None, measure: Callable[[Mapping[str, int]], float] = real_kl
) -> Chooser:
    made = Chooser(plans(), read_budget(size, kl, mixed=True))
    made.measure(options(), measure)
    return made


def test_the_default_budget_is_uniform_four_bits() -> None:
    found = chooser(None, None)
    assert found.limit == UNITS * SIZES[4] + NORM.bytes == found.least_bytes
    assert set(found.choose(real_kl).bits.values()) == {4}


def test_a_size_is_filled_where_it_pays_most() -> None:
    limit = UNITS * SIZES[4] + NORM.bytes + 2 * (SIZES[8] - SIZES[4])
    found = chooser(str(limit), None).choose(real_kl)
    assert found.bytes == limit
    assert found.bits == {f"u{i}": 8 if i < 2 else 4 for i in range(UNITS)}
    assert found.predicted_kl == pytest.approx(real_kl(found.bits))


def test_what_was_measured_decides_over_the_prediction() -> None:
    def odd(bits: Mapping[str, int]) -> float:
        # All alike is good, any mixture is terrible.
        whole = [bits.get(f"u{i}", 16) for i in range(UNITS)]
        return 0.5 if len(set(whole)) == 1 else 9.0

    found = chooser("0.4", None, odd).choose(odd)
    assert set(found.bits.values()) == {4} and found.probe_kl == 0.5


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("allowed", [1.5, 0.3, 0.02, 1e-6])
def test_a_kl_is_met_in_the_fewest_bytes_of_the_hull(allowed: float, factor: float) -> None:
    def measure(bits: Mapping[str, int]) -> float:
        return real_kl(bits, factor)

    found = chooser(None, allowed, measure).choose(measure)
    assert (
        found.final_kl == pytest.approx(real_kl(found.bits, factor)) and found.final_kl <= allowed
    )
    bits = sorted(SIZES)
    ladder = [{f"u{i}": bits[p] for i, p in enumerate(v.picks)} for v in hull(options())]
    assert found.bits == next(step for step in ladder if measure(step) <= allowed)


def test_blocks_in_order_that_lose_more_get_more_bits() -> None:
    made: list[dict[str, int]] = []

    def quantize(bits: Mapping[str, int]) -> float:
        made.append(dict(bits))
        return real_kl(bits, 4.0)

    found = chooser(None, 0.1).choose(quantize)
    assert found.final_kl <= 0.1 < real_kl(made[0], 4.0)
    assert len(made) > 1 and found.probe_kl < 0.1


def test_refusals() -> None:
    with pytest.raises(InputRefused, match="--max-size 0.2 is 0.00 MB of weights"):
        chooser("0.2", None)
    with pytest.raises(
        InputRefused, match=r"--max-kl 0.01: the best choice within --max-size 0.3 "
    ):
        chooser("0.3", 0.01).choose(real_kl)
    with pytest.raises(InputRefused, match=r"--max-kl 1e-06: with the finest choice"):
        chooser(None, 1e-6).choose(lambda _: 1e-5)


def test_the_curve_has_its_points_and_the_record_all_figures() -> None:
    found = chooser("0.5", None)
    hull = [p for p in found.points if p.kind == "hull"]
    assert len(hull) >= 6 and [p.bytes for p in hull] == sorted(p.bytes for p in hull)
    kls = [p.measured_kl for p in hull]
    assert kls == sorted(kls, reverse=True)
    assert {p.label for p in found.points if p.kind == "uniform"} == {
        "int4, all units",
        "int8, all units",
        "uniform int4",
    }
    choice = found.choose(real_kl)
    document = record(found, choice, options())
    allocation = document["allocation"]
    assert allocation["budget"] == {"max_size": "0.5", "max_kl": None, "bytes": found.limit}
    assert allocation["measured_kl"] == choice.final_kl
    assert [u["bits"] for u in allocation["units"]] == list(choice.bits.values())
    assert allocation["units"][0]["options"][0] == {"bits": 4, "bytes": 540, "kl": 1.0}
    last = document["tradeoff"]["points"][-1]
    assert (last["kind"], last["bytes"]) == ("chosen", choice.bytes)
