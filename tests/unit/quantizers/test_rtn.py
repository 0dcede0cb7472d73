from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize, unpack
from exporter.core.errors import InputRefused
from exporter.quantizers import grid, rtn
from exporter.quantizers.rtn import join_rows, quantize_matrix, quantize_rows, row_chunks

FORMATS = [
    BlockFormat(bits, block, symmetric)
    for bits in (4, 8)
    for block in (16, 32, 128)
    for symmetric in (False, True)
]


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.02 * np.random.default_rng(seed).standard_t(5, (rows, columns))).astype(np.float32)


def error(w: NDArray[np.float32], packed: PackedMatrix) -> float:
    return float(np.square(dequantize(packed).astype("f8") - w).sum())


def steps(packed: PackedMatrix) -> NDArray[np.float32]:
    """Scale of each value ``[N, K]``."""
    each = np.repeat(packed.scales.astype(np.float32), packed.format.block, axis=1)
    return each[:, : packed.columns]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [128, 100])
def test_plain_rounding_is_within_half_a_step(fmt: BlockFormat, columns: int) -> None:
    w = heavy_tailed(9, columns)

    packed = quantize_matrix(w, fmt, search=False)

    # Scales are rounded to float16 (2**-11) and zero points to whole steps: the ends of a range may
    # lie up to another half step outside the grid.
    slack = 0.5 + fmt.top * 2.0**-11
    inside = np.abs(dequantize(packed) - w) <= (0.5 + 2.0**-10) * steps(packed)
    assert np.all(np.abs(dequantize(packed) - w) <= (0.5 + slack) * steps(packed))
    assert inside.mean() > 0.95


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_search_lowers_the_error_of_every_block(fmt: BlockFormat) -> None:
    w = heavy_tailed(20, 256)

    plain = dequantize(quantize_matrix(w, fmt, search=False)) - w
    searched = dequantize(quantize_matrix(w, fmt, search=True)) - w

    def per_block(e: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.square(e.astype("f8")).reshape(20, -1, fmt.block).sum(-1)

    assert np.all(per_block(searched) <= per_block(plain) * (1 + 1e-5))
    # At 8 bits there is next to nothing to gain: that is why schemes do not search there.
    gain = 0.97 if fmt.bits == 4 else 0.9995
    assert per_block(searched).sum() < gain * per_block(plain).sum()


def brute_force(w: NDArray[np.float32], fmt: BlockFormat) -> float:
    """Least squared error over all pairs of clipped ends, each block by itself, in float64."""
    total = 0.0
    for block in w.astype("f8").reshape(-1, fmt.block):
        bottom, top = min(block.min(), 0), max(block.max(), 0)
        best = np.inf
        for down, up in itertools.product(np.arange(0.5, 1.06, 0.05), repeat=2):
            scale = float(np.float16((up * top - down * bottom) / fmt.top))
            zero = np.clip(np.round(-down * bottom / scale), 0, fmt.top)
            codes = np.clip(np.round(block / scale) + zero, 0, fmt.top)
            best = min(best, float(np.square((codes - zero) * scale - block).sum()))
        total += best
    return total


def test_the_short_search_is_near_an_exhaustive_one() -> None:
    w, fmt = heavy_tailed(8, 256), BlockFormat(4, 32, symmetric=False)

    found = error(w, quantize_matrix(w, fmt, search=True))

    assert found < 1.015 * brute_force(w, fmt)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 5),
    st.integers(1, 150),
    st.booleans(),
    st.integers(0, 2**32),
    st.floats(1e-6, 1e4),
)
def test_the_error_reported_is_the_error_of_what_is_stored(
    fmt: BlockFormat, rows: int, columns: int, search: bool, seed: int, size: float
) -> None:
    w = heavy_tailed(rows, columns, seed) * np.float32(size)

    result = quantize_rows(w, fmt, search=search)

    norm = float(np.square(w.astype("f8")).sum())
    expected = error(w, result.packed)
    assert result.squared_error == pytest.approx(expected, rel=1e-3, abs=1e-9 * norm)
    assert result.squared_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("search", [False, True])
def test_zero_blocks_are_exact_and_their_neighbours_not_harmed(
    fmt: BlockFormat, search: bool
) -> None:
    w = heavy_tailed(4, 2 * fmt.block)
    w[:, : fmt.block] = 0

    packed = quantize_matrix(w, fmt, search=search)

    assert np.all(dequantize(packed)[:, : fmt.block] == 0)
    assert np.isfinite(packed.scales).all()
    assert error(w, packed) < 0.03 * np.square(w).sum()
    assert quantize_rows(np.zeros((2, 32), "f4"), fmt, search=search).relative_error == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("value", [0.37, -0.37, 6e-8, -1e-7, 60000.0, -60000.0])
def test_blocks_of_one_value(fmt: BlockFormat, value: float) -> None:
    w = np.full((3, 2 * fmt.block), value, np.float32)

    got = dequantize(quantize_matrix(w, fmt, search=False))

    # A scale is a float16: relative 2**-11, absolutely not finer than its smallest subnormal.
    assert np.all(np.abs(got - w) <= max(abs(value) * 2.0**-10, 2.0**-25))


def test_one_outlier_does_not_spoil_other_blocks() -> None:
    w, fmt = heavy_tailed(1, 128), BlockFormat(4, 32, symmetric=False)
    with_outlier = w.copy()
    with_outlier[0, 0] = 50.0

    one, other = (quantize_matrix(m, fmt, search=True) for m in (w, with_outlier))

    assert np.array_equal(one.qdata[:, 1:], other.qdata[:, 1:])
    assert np.array_equal(one.scales[:, 1:], other.scales[:, 1:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", FORMATS[:2], ids=str)
def test_nan_and_infinity_are_refused_by_name(bad: float, fmt: BlockFormat) -> None:
    w = heavy_tailed(40, 64)
    w[33, 5] = bad

    with pytest.raises(InputRefused, match=r"q_proj\.weight.*NaN or infinite") as caught:
        quantize_matrix(w, fmt, search=True, name="q_proj.weight")
    assert "\n" not in str(caught.value)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(InputRefused, match="float16"):
        quantize_matrix(
            np.full((2, 32), 1e7, np.float32), BlockFormat(4, 32, symmetric=True), search=False
        )


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-8, 1e5))
def test_scales_are_rounded_as_numpy_rounds_to_float16(seed: int, size: float) -> None:
    x = (np.random.default_rng(seed).uniform(0, size, 64)).astype(np.float32)
    x = np.append(x, np.float32([0, 2**-24, 2**-25, 2**-26, 2**-14, 65504, 1 + 2**-11, 3 * 2**-25]))
    finite = x < 65504
    half = np.where(finite, x, 0).astype(np.float16)
    expected = np.where((x > 0) & (half == 0), np.float32(2**-24), half)

    scale, inverse = grid.stored(x)

    assert np.array_equal(scale[finite], expected[finite].astype(np.float32))
    assert np.all(inverse[scale == 0] == 0)
    assert np.all(np.abs(inverse * scale - 1)[scale > 0] < 1e-6)


def test_chunks_cover_all_rows_once_and_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w, fmt = heavy_tailed(70, 96), BlockFormat(4, 32, symmetric=False)
    whole = quantize_rows(w, fmt, search=True)
    monkeypatch.setattr(rtn, "CHUNK", 1000)

    chunks = row_chunks(70, 96, 32)
    joined = join_rows([quantize_rows(w[c], fmt, search=True) for c in chunks])

    assert len(chunks) > 3
    assert [r for c in chunks for r in range(70)[c]] == list(range(70))
    assert np.array_equal(joined.packed.qdata, whole.packed.qdata)
    assert np.array_equal(joined.packed.scales, whole.packed.scales)
    assert joined.packed.zero_points is not None
    assert whole.packed.zero_points is not None
    assert np.array_equal(joined.packed.zero_points, whole.packed.zero_points)
    assert joined.relative_error == pytest.approx(whole.relative_error, rel=1e-6)


def test_smaller_blocks_lose_less_and_padding_loses_nothing() -> None:
    w = heavy_tailed(16, 960)
    errors = [
        quantize_rows(w, BlockFormat(4, block, symmetric=False), search=True).relative_error
        for block in (32, 64, 128)
    ]
    assert errors == sorted(errors)

    padded = np.pad(w, ((0, 0), (0, 64)))
    fmt = BlockFormat(4, 128, symmetric=False)
    ragged, full = (quantize_matrix(m, fmt, search=True) for m in (w, padded))
    assert np.array_equal(dequantize(ragged), dequantize(full)[:, :960])
    assert np.array_equal(unpack(ragged.qdata, 4, 128), unpack(full.qdata, 4, 128))
