from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.core.blocks import BlockFormat, unpack
from exporter.quantizers.packing import check_format, pack, pack_values, packed_bytes


@settings(deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32))
def test_unpack_inverts_pack_values(bits: int, rows: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)

    packed = pack_values(values, bits)

    assert packed.shape == (rows, -(-count * bits // 8))
    assert np.array_equal(unpack(packed, bits, count), values)


def test_the_first_value_lies_in_the_low_half() -> None:
    packed = pack_values(np.array([[0x1, 0xF, 0x7]], np.uint8), 4)

    assert packed.tolist() == [[0xF1, 0x07]]


@settings(deadline=None)
@given(st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.booleans(), st.integers(1, 200))
def test_packed_bytes_is_the_size_of_what_is_packed(
    bits: int, block: int, symmetric: bool, columns: int
) -> None:
    fmt, rows, blocks = BlockFormat(bits, block, symmetric), 3, -(-columns // block)
    codes = np.zeros((rows, blocks, block), np.uint8)
    zeros = None if symmetric else np.zeros((rows, blocks), np.uint8)

    matrix = pack(codes, np.zeros((rows, blocks), np.float16), zeros, fmt, columns)

    assert packed_bytes(rows, columns, fmt) == matrix.nbytes


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 24), (4, 8), (8, 0), (16, 32)])
def test_a_format_that_the_kernels_lack_is_an_error(bits: int, block: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        check_format(BlockFormat(bits, block, symmetric=False))


def test_parts_that_do_not_fit_are_an_error() -> None:
    codes, scales = np.zeros((2, 3, 32), np.uint8), np.zeros((2, 3), np.float16)

    with pytest.raises(ValueError, match="do not fit"):
        pack(codes, scales, None, BlockFormat(4, 32, symmetric=False), 96)
    with pytest.raises(ValueError, match="do not fit"):
        pack(codes, scales, None, BlockFormat(4, 32, symmetric=True), 97)
