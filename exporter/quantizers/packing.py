"""Codes to packed bytes: the inverse of `core.blocks.unpack`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.blocks import BlockFormat, PackedMatrix

MIN_BLOCK = 16


def pack_values(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the last axis of `values`, each below ``2**bits``, into bytes.

    Two 4-bit values a byte, the first in the low half, an odd last one beside zero; 8-bit values are
    returned as they are.
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate((values, np.zeros_like(values[..., :1])), axis=-1)
    # One 16-bit word holds a pair (low byte first), so that whole vectors are shifted at once.
    pairs: NDArray[np.uint16] = np.ascontiguousarray(values).view("<u2")
    return (pairs | pairs >> 4).astype(np.uint8)


def pack(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zeros: NDArray[np.uint8] | None,
    fmt: BlockFormat,
    columns: int,
) -> PackedMatrix:
    """Pack a matrix given block by block.

    codes: ``[N, blocks, block]``; scales: ``[N, blocks]``; zeros: ``[N, blocks]``, or None when
    symmetric; columns: K before padding. Raises ValueError when these do not fit together.
    """
    check_format(fmt)
    blocks = -(-columns // fmt.block)
    shapes: tuple[Any, ...] = (
        codes.shape[1:],
        scales.shape,
        None if zeros is None else zeros.shape,
    )
    per_block = (codes.shape[0], blocks)
    if shapes != ((blocks, fmt.block), per_block, None if fmt.symmetric else per_block):
        raise ValueError(f"shapes {shapes} do not fit {fmt} with {columns} columns")
    packed_zeros = None if zeros is None else pack_values(zeros, fmt.bits)
    return PackedMatrix(fmt, columns, pack_values(codes, fmt.bits), scales, packed_zeros)


def check_format(fmt: BlockFormat) -> None:
    """Raise ValueError for a format that onnxruntime's MatMulNBits does not have."""
    if fmt.bits not in (4, 8) or fmt.block < MIN_BLOCK or fmt.block & (fmt.block - 1):
        raise ValueError(f"{fmt}: expected 4 or 8 bits and a power of two of at least {MIN_BLOCK}")


def packed_bytes(rows: int, columns: int, fmt: BlockFormat) -> int:
    """Bytes of a packed ``[rows, columns]`` matrix: codes, scales and zero points."""
    blocks = -(-columns // fmt.block)
    zeros = 0 if fmt.symmetric else (blocks * fmt.bits + 7) // 8
    return rows * (blocks * fmt.block * fmt.bits // 8 + 2 * blocks + zeros)
