"""The merge's numbers against closed forms, and float16 rounding against numpy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporter.adapters import arithmetic
from exporter.adapters.arithmetic import (
    LowRank,
    apply_update,
    count_changed,
    row_chunks,
    to_float16,
)
from exporter.adapters.rounding import half_step, perturb, rounding_steps
from exporter.core.errors import InputRefused, ParityFailed

HALVES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-24, 65504.0]) | st.floats(-9, 9, width=16)
FINITE = st.floats(-60000, 60000, width=32)


def low_rank(rows: int, columns: int, axis: int, magnitude: bool, seed: int) -> LowRank:
    random = np.random.default_rng(seed)
    left = random.normal(size=(rows, 3)).astype(np.float32)
    right = random.normal(size=(3, columns)).astype(np.float32)
    size = rows if axis else columns
    scale = random.uniform(0.5, 2, size).astype(np.float32) if magnitude else None
    return LowRank(left, right, scale, axis)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 20),
    axis=st.integers(0, 1),
    magnitude=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_closed_form_for_any_shape_and_chunk(
    rows: int, columns: int, axis: int, magnitude: bool, seed: int
) -> None:
    change = low_rank(rows, columns, axis, magnitude, seed)
    start = np.random.default_rng(seed + 1).normal(size=(rows, columns)).astype(np.float32)
    expected = start.astype(np.float64) + change.left.astype(np.float64) @ change.right
    if change.magnitude is not None:
        norm = np.sqrt((expected**2).sum(axis=axis))
        expected *= np.expand_dims(change.magnitude / norm, axis)
    chunk, arithmetic.CHUNK_VALUES = arithmetic.CHUNK_VALUES, 50
    try:
        weight = start.copy()
        result = apply_update(weight, change)
    finally:
        arithmetic.CHUNK_VALUES = chunk
    assert np.allclose(weight, expected, rtol=1e-4, atol=1e-4)
    wanted = np.linalg.norm(expected - start) / np.linalg.norm(start)
    assert result == pytest.approx(wanted, rel=1e-3)


def test_a_delta_below_float16_is_seen_as_no_change() -> None:
    weight = np.ones((4, 4), np.float32)
    tiny = LowRank(np.full((4, 1), 1e-5, np.float32), np.ones((1, 4), np.float32), None, 1)
    before = to_float16("x", weight)
    assert apply_update(weight, tiny) == pytest.approx(1e-5, rel=0.02)
    assert count_changed(before, to_float16("x", weight)) == 0


@given(hnp.arrays(np.float16, 6, elements=HALVES), hnp.arrays(np.float16, 6, elements=HALVES))
def test_changed_values_are_those_that_numpy_finds_unequal(a: np.ndarray, b: np.ndarray) -> None:
    assert count_changed(a, b) == np.count_nonzero(a != b)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple))
def test_row_chunks_cover_each_row_once(shape: tuple[int, ...]) -> None:
    rows = [i for piece in row_chunks(shape) for i in range(shape[0])[piece]]
    assert rows == list(range(shape[0]))


@pytest.mark.parametrize("value", [65520.0, -1e5, np.nan, np.inf])
def test_what_float16_cannot_hold_is_refused_by_name(value: float) -> None:
    with pytest.raises(InputRefused, match="'model.norm.weight'"):
        to_float16("model.norm.weight", np.array([1.0, value], np.float32))
    assert to_float16("x", np.array([65519.0], np.float32))[0] == 65504


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, 8, elements=FINITE))
def test_half_step_bounds_the_rounding(values: np.ndarray) -> None:
    tensor = torch.from_numpy(values)
    half = half_step(tensor).numpy()
    error = np.abs(values.astype(np.float16).astype(np.float32) - values)
    assert (error <= half).all()
    # The step of float16 at the value, as numpy has it for the float16 toward zero.
    toward = np.array([np.float16(v) for v in values])
    over = np.abs(toward.astype(np.float32)) > np.abs(values)
    toward = np.where(over, np.nextafter(toward, np.float16(0)), toward)
    assert np.array_equal(half * 2, np.spacing(np.abs(toward)).astype(np.float32))


def test_perturb_moves_within_the_rounding_and_not_zeros() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 0.02
    values[:10] = 0
    moved = perturb(values, torch.Generator().manual_seed(2))
    assert bool(((moved - values).abs() <= half_step(values) * 1.0001).all())
    assert torch.equal(moved[:10], values[:10])
    # Rounding errors and draws are of one size: both even over half a step.
    rounding = (values.half().float() - values).std()
    assert float((moved - values).std() / rounding) == pytest.approx(1, rel=0.05)


def test_rounding_steps() -> None:
    exact = torch.tensor([1.0, 0.3, -2.7])
    assert rounding_steps("x", exact.half(), exact) <= 0.5
    with pytest.raises(ParityFailed, match="'x' is"):
        rounding_steps("x", exact.half() + 2 * 2.0**-10, exact)
    with pytest.raises(ParityFailed, match="peft's is"):
        rounding_steps("x", exact[:2], exact)
