"""The knapsack against all assignments, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.quantizers.allocate import Assignment, Option, assign, best_within, hull

OPTION = st.builds(
    Option,
    st.sampled_from([4, 8, 16]),
    st.integers(1, 60),
    st.floats(0, 2, allow_nan=False).map(lambda x: round(x, 3)),
)
UNITS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=6)


def every(units: Sequence[Sequence[Option]]) -> list[Assignment]:
    return [assign(units, p) for p in itertools.product(*(range(len(o)) for o in units))]


@settings(max_examples=60, deadline=None)
@given(UNITS)
def test_vertices_are_optimal_for_their_bytes_and_convex(units: list[list[Option]]) -> None:
    found, all_of_them = hull(units), every(units)
    assert found[0].bytes == min(a.bytes for a in all_of_them)
    assert found[-1].kl == pytest.approx(min(a.kl for a in all_of_them))
    for vertex in found:
        assert vertex == assign(units, vertex.picks)
        assert vertex.kl <= min(a.kl for a in all_of_them if a.bytes <= vertex.bytes) + 1e-9
    slopes = [(a.kl - b.kl) / (b.bytes - a.bytes) for a, b in itertools.pairwise(found)]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(slopes))
    assert all(a.bytes < b.bytes for a, b in itertools.pairwise(found))


@settings(max_examples=100, deadline=None)
@given(UNITS, st.integers(0, 400))
def test_the_best_within_a_limit_is_that_of_all_assignments(
    units: list[list[Option]], limit: int
) -> None:
    found = best_within(units, limit)
    fitting = [a for a in every(units) if a.bytes <= limit]
    if not fitting:
        assert found is None
        return
    assert found is not None and found == assign(units, found.picks)
    assert found.bytes <= limit
    assert found.kl == pytest.approx(min(a.kl for a in fitting), abs=1e-12)


def model(blocks: int) -> list[list[Option]]:
    """Units as a decoder has them: few different sizes, sensitivities over four decades."""
    rng = np.random.default_rng(5)
    units = []
    for _ in range(blocks):
        for weights in (1.5e6, 0.9e6, 4.9e6, 2.5e6):
            kl = float(10 ** rng.uniform(-5, -1))
            units.append(
                [
                    Option(4, int(weights * 0.539), kl),
                    Option(8, int(weights * 1.016), kl / 200),
                    Option(16, int(2 * weights), 0.0),
                ]
            )
    return units


@pytest.mark.parametrize("share", [0.28, 0.35, 0.5, 0.8])
def test_a_large_model_meets_its_bound(share: float) -> None:
    units = model(32)
    limit = int(share * sum(o[-1].bytes for o in units))
    found = best_within(units, limit)
    vertices = hull(units)
    assert found is not None and found.bytes <= limit
    # No assignment lies below the line between the two vertices around the limit.
    bound = float(np.interp(limit, [v.bytes for v in vertices], [v.kl for v in vertices]))
    assert bound * (1 - 1e-9) <= found.kl <= bound * 1.02
    assert found.kl <= min(v.kl for v in vertices if v.bytes <= limit)


def test_equal_kl_takes_fewer_bytes() -> None:
    units = [[Option(8, 10, 0.5), Option(16, 20, 0.5)], [Option(8, 10, 0.1), Option(4, 5, 0.1)]]
    assert best_within(units, 1000) == Assignment((0, 1), 15, 0.6)


@pytest.mark.parametrize("bad", [[[]], [[Option(4, 1, float("nan"))]], [[Option(4, 1, -0.1)]]])
def test_what_is_no_option_is_refused(bad: list[list[Option]]) -> None:
    with pytest.raises(ValueError, match="unit 0"):
        hull(bad)
