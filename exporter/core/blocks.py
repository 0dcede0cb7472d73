"""Block-quantized weight matrices: the layout shared by quantizers, graphs and runtimes.

A matrix ``[N, K]`` is cut along K into blocks of `block` values; each block has one scale and,
when asymmetric, one zero point. Values are unsigned: ``w = (q - zero_point) * scale``. The packed
bytes are those of onnxruntime's MatMulNBits: two 4-bit values a byte, the first in the low half;
K is padded to whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

QDATA, SCALES, ZEROS = ".qdata", ".scales", ".zero_points"


@dataclass(frozen=True)
class BlockFormat:
    """Storage of one matrix: `bits` (4 or 8), `block` (values per scale), symmetric or not.

    `positive`: a quantizer may choose no scale below 0 (asymmetric blocks never have one).
    """

    bits: int
    block: int
    symmetric: bool
    positive: bool = False

    @property
    def middle(self) -> int:
        """The implied zero point of a symmetric matrix (8 for 4 bits, 128 for 8)."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest unsigned value (15 or 255)."""
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class PackedMatrix:
    """A quantized ``[rows, columns]`` matrix.

    qdata: uint8 ``[N, blocks, block * bits / 8]``; scales: float16 ``[N, blocks]``;
    zero_points: uint8 ``[N, ceil(blocks * bits / 8)]``, or None when symmetric.
    """

    format: BlockFormat
    columns: int
    qdata: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None

    @property
    def rows(self) -> int:
        """N."""
        return int(self.qdata.shape[0])

    @property
    def blocks(self) -> int:
        """Blocks of one row."""
        return int(self.qdata.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zeros = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.qdata.nbytes + self.scales.nbytes + zeros


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Unpack the last axis of `packed` to `count` unsigned values of `bits` bits."""
    if bits == 8:
        return packed[..., :count]
    both = np.stack((packed & 0x0F, packed >> 4), axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]


def dequantize(matrix: PackedMatrix) -> NDArray[np.float32]:
    """The float32 ``[N, K]`` matrix that the packed one stands for."""
    form = matrix.format
    values = unpack(matrix.qdata, form.bits, form.block).astype(np.float32)
    if matrix.zero_points is None:
        zeros = np.full((matrix.rows, matrix.blocks), form.middle, np.float32)
    else:
        zeros = unpack(matrix.zero_points, form.bits, matrix.blocks).astype(np.float32)
    values -= zeros[..., None]
    values *= matrix.scales.astype(np.float32)[..., None]
    return values.reshape(matrix.rows, -1)[:, : matrix.columns]
