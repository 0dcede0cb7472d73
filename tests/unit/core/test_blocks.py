from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core.blocks import BlockFormat, PackedMatrix, dequantize, unpack


def test_four_bit_values_lie_low_half_first() -> None:
    packed = np.array([[0x21, 0xF3]], np.uint8)

    assert unpack(packed, 4, 4).tolist() == [[1, 2, 3, 15]]
    assert unpack(packed, 4, 3).tolist() == [[1, 2, 3]]
    assert unpack(packed, 8, 2).tolist() == [[0x21, 0xF3]]


def test_the_format_knows_its_range() -> None:
    four, eight = BlockFormat(4, 32, symmetric=True), BlockFormat(8, 32, symmetric=False)

    assert (four.middle, four.top) == (8, 15)
    assert (eight.middle, eight.top) == (128, 255)


@settings(deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 150),
    seed=st.integers(0, 2**32),
)
def test_dequantize_follows_the_formula_value_by_value(
    bits: int, block: int, symmetric: bool, rows: int, columns: int, seed: int
) -> None:
    rng, blocks = np.random.default_rng(seed), -(-columns // block)
    qdata = rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
    scales = rng.standard_normal((rows, blocks)).astype(np.float16)
    zeros = rng.integers(0, 256, (rows, -(-blocks * bits // 8)), np.uint8)
    fmt = BlockFormat(bits, block, symmetric)

    got = dequantize(PackedMatrix(fmt, columns, qdata, scales, None if symmetric else zeros))

    def value(of: np.ndarray, at: int) -> int:  # type: ignore[type-arg]
        return int(of[at]) if bits == 8 else int(of[at // 2]) >> 4 * (at % 2) & 15

    assert got.shape == (rows, columns)
    assert got.dtype == np.float32
    for r, c in zip(rng.integers(0, rows, 20), rng.integers(0, columns, 20), strict=True):
        b = c // block
        zero = fmt.middle if symmetric else value(zeros[r], b)
        expected = (value(qdata[r, b], c % block) - zero) * np.float32(scales[r, b])
        assert got[r, c] == np.float32(expected)


@pytest.mark.parametrize(("symmetric", "zeros"), [(True, 0), (False, 3 * 1)])
def test_bytes_count_codes_scales_and_zero_points(symmetric: bool, zeros: int) -> None:
    points = None if symmetric else np.zeros((3, 1), np.uint8)
    matrix = PackedMatrix(
        BlockFormat(4, 32, symmetric),
        40,
        np.zeros((3, 2, 16), np.uint8),
        np.zeros((3, 2), np.float16),
        points,
    )

    assert (matrix.rows, matrix.blocks) == (3, 2)
    assert matrix.nbytes == 3 * 2 * 16 + 3 * 2 * 2 + zeros
