"""Unsigned 4- and 8-bit values in 32-bit words, the first value in the lowest bits.

GPTQ and AWQ store words (little-endian int32), MatMulNBits bytes with the first value in the low
half: the same bits in the same order, so that one is a view of the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import unpack

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]


def per_word(bits: int) -> int:
    """Values in one word: 8 of 4 bits, 4 of 8 bits."""
    return 32 // bits


def pack_bytes(values: Codes, bits: int) -> Codes:
    """Pack the last axis into bytes, an odd last 4-bit value beside zero; `blocks.unpack` undoes it."""
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate((values, np.zeros_like(values[..., :1])), axis=-1)
    packed: Codes = values[..., ::2] | np.left_shift(values[..., 1::2], np.uint8(4))
    return packed


def pack_words(values: Codes, bits: int) -> Words:
    """Pack the last axis, a multiple of `per_word` values, into int32 words."""
    packed: Words = np.ascontiguousarray(pack_bytes(values, bits)).view("<i4")
    return packed


def unpack_words(words: Words, bits: int) -> Codes:
    """Values of the last axis: ``[..., W]`` words to ``[..., W * per_word]`` uint8."""
    return unpack(as_bytes(words), bits, words.shape[-1] * per_word(bits))


def as_bytes(words: Words) -> Codes:
    """The bytes of the last axis, ``[..., 4 * W]``."""
    data: Codes = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    return data


def ones(bits: int) -> np.uint32:
    """A word whose every value is 1."""
    return np.uint32(0x11111111 if bits == 4 else 0x01010101)
