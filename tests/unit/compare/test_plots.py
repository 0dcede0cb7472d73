"""The report's pictures: marks lie where their figures say, and every picture has its text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.compare.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    linear_axis,
    log_axis,
    plots,
)
from exporter.compare.records import (
    CaptionRow,
    CaseRow,
    Comparison,
    Distribution,
    Figure,
    Length,
    Row,
    Speed,
    Truth,
)

VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6)


def row(name: str, role: str, size: int, kl: float | None, right: int) -> Row:
    half = Figure(right / 40, right / 40 - 0.05, right / 40 + 0.04, 8, 4)
    speed = Speed(
        runs=9, rounds=3, images=3, threads=1, prepare=1.0, vision=2.0, first_token=5.0,
        per_token=1.0, tokens_per_second=1000.0, total=20.0 + right, first_token_p90=None,
        total_p90=None, spread=0.1, load=50.0,
    )  # fmt: skip
    told = Distribution(8, 80, kl, kl / 4, kl / 2, 3 * kl, 9 * kl, 0.99, 1.0, 8, 7, None) if kl is not None else None  # fmt: skip
    return Row(
        name=name, role=role, runtime="ort", threads=1, model_sha256="", versions={},  # type: ignore[arg-type]
        parts={"decoder": size}, bytes=size, ratio=1.0, length=Length(80, 1.0, 0), speed=speed,
        truth=Truth(right, 40, 40, half, 0.9, {}), distribution=told,
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    """Two candidates that differ in size, distance and facts; made by hand."""
    rows = (
        row("fp16", "reference", 9_000_000, None, 38),
        row("noise floor", "noise floor", 9_000_000, 0.0, 38),
        row("int4", "candidate", 3_000_000, 2e-3, 35),
        row("int8", "candidate", 5_000_000, 4e-5, 38),
    )

    def caption(kl: float | None) -> CaptionRow:
        return CaptionRow("a", 1, True, kl, None, None, ())

    cases = tuple(
        CaseRow(f"c{i}", "c.png", "p", "ct", None, None, {
            "fp16": caption(None), "noise floor": caption(0.0),
            "int4": caption(1e-3 * (i + 1)), "int8": caption(1e-5 * (i + 1)),
        })
        for i in range(8)
    )  # fmt: skip
    return Comparison(
        schema=1, summary="", reference="fp16", prompt="", max_new_tokens=8, images=8, patients=4,
        captioned=8, modalities={"ct": 8}, machine={}, method={}, rows=rows, cases=cases,
    )  # fmt: skip


@given(VALUES)
def test_axes_hold_all_values_in_order(values: list[float]) -> None:
    for axis in (linear_axis("x", values, str), log_axis("x", values, str)):
        shares = [axis.share(v) for v in sorted(values)]
        assert shares == sorted(shares)
        assert all(axis.low <= v * (1 + 1e-9) and v <= axis.high * (1 + 1e-9) for v in values)
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 14 and ticks == sorted(ticks)
        assert all(-1e-6 <= axis.share(t) <= 1 + 1e-6 for t in ticks)


def test_a_logarithmic_axis_has_decades() -> None:
    axis = log_axis("KL", [3e-5, 2e-3], str)
    assert (axis.low, axis.high) == (pytest.approx(1e-5), pytest.approx(1e-2))
    assert axis.share(1e-4) == pytest.approx(1 / 3)
    assert axis.share(0.0) == 0


def test_pictures_of_a_comparison(comparison: Comparison) -> None:
    drawn = plots(comparison)
    figures = re.findall(r"<figure>.*?</figure>", drawn, re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        svg = tree.find("svg")
        assert svg is not None and svg.get("role") == "img"
        title = svg.find("title")
        assert title is not None and title.text == svg.get("aria-label")
        candidates = [r.name for r in comparison.rows if r.role == "candidate"]
        assert all(name in (title.text or "") for name in candidates)
        for circle in svg.findall("circle"):
            assert LEFT <= float(circle.get("cx", "")) <= WIDTH - RIGHT
            assert TOP <= float(circle.get("cy", "")) <= HEIGHT - BOTTOM


def test_what_was_not_measured_is_not_drawn(comparison: Comparison) -> None:
    import msgspec

    bare = msgspec.structs.replace(
        comparison,
        rows=tuple(
            msgspec.structs.replace(r, distribution=None, speed=None, truth=None)
            for r in comparison.rows
        ),
        cases=(),
    )
    assert plots(bare) == ""
