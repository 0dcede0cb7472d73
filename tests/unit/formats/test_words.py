"""Words against torch loops, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.formats.awq_read import unpack_gemm
from exporter.formats.words import pack_bytes, pack_words, unpack_words
from tests.unit.formats import reference

BITS = st.sampled_from((4, 8))


@given(BITS, st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_words_are_those_of_the_definition(bits: int, rows: int, words: int, seed: int) -> None:
    codes = _codes(seed, rows, words * 32 // bits, bits)
    packed = pack_words(codes, bits)
    expected = reference.pack_rows(torch.from_numpy(codes.astype(np.int64)).T, bits).T
    assert packed.dtype == np.int32
    assert np.array_equal(packed, expected.numpy())
    assert np.array_equal(unpack_words(packed, bits), codes)


@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_an_odd_last_value_stands_beside_zero(count: int, seed: int) -> None:
    codes = _codes(seed, 2, count, 4)
    packed = pack_bytes(codes, 4)
    pairs = [int(b) for b in packed[0]]
    flat = [(p >> s) & 15 for p in pairs for s in (0, 4)]
    assert flat == [*map(int, codes[0]), *([0] if count % 2 else [])]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_awq_words_come_back_in_order(rows: int, words: int, seed: int) -> None:
    codes = _codes(seed, rows, 8 * words, 4)
    packed = reference.awq_pack(torch.from_numpy(codes.astype(np.int64)))
    assert np.array_equal(unpack_gemm(packed.numpy()), codes)


def test_awq_order_by_hand() -> None:
    # Columns 0 to 7 hold 0 to 7: fields from the lowest are the columns 0 2 4 6 1 3 5 7.
    word = np.array([[0x75316420]], np.int32)
    assert unpack_gemm(word).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_highest_bit_survives(bits: int) -> None:
    codes = np.full((1, 32 // bits), (1 << bits) - 1, np.uint8)
    assert pack_words(codes, bits).tolist() == [[-1]]


def _codes(seed: int, rows: int, count: int, bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
