"""The 4-bit NormalFloat storage of bitsandbytes: 16 fixed values, one absmax per block.

Dettmers et al., QLoRA, arXiv 2305.14314, appendix E: the code's values are the means of
neighbouring quantiles of a standard normal, scaled to [-1, 1], with an exact zero. A matrix is
flattened row by row and cut into blocks; two codes a byte, the first in the *high* half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NF4_DATA, NF4_SCALES = ".nf4", ".absmax"
NF4_BLOCK = 64
# Table of the paper's appendix E, rounded to float32 as all implementations hold it.
NF4_VALUES: NDArray[np.float32] = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@dataclass(frozen=True)
class Nf4Matrix:
    """A ``[rows, columns]`` matrix in NF4.

    data: uint8 ``[ceil(rows * columns / 2)]``; absmax: float32 ``[ceil(rows * columns / block)]``.
    """

    rows: int
    columns: int
    block: int
    data: NDArray[np.uint8]
    absmax: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and maxima."""
        return self.data.nbytes + self.absmax.nbytes


def nf4_shapes(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Bytes of the codes and number of maxima of a ``[rows, columns]`` matrix."""
    return -(-rows * columns // 2), -(-rows * columns // block)


def quantize_nf4(weight: NDArray[np.float32], block: int = NF4_BLOCK) -> Nf4Matrix:
    """NF4 codes nearest to ``weight / absmax`` per block of the flattened matrix.

    A block of zeros has maximum 0 and codes of the value 0. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    if not np.isfinite(weight).all():
        raise ValueError("the matrix holds NaN or infinity")
    size = rows * columns
    flat = np.zeros(-(-size // block) * block, np.float32)
    flat[:size] = weight.reshape(-1)
    blocks = flat.reshape(-1, block)
    absmax = np.abs(blocks).max(axis=1)
    inverse = np.divide(np.float32(1), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    # A value between two codes goes to the nearer; exactly between, to the lower.
    between = (NF4_VALUES[1:] + NF4_VALUES[:-1]) / np.float32(2)
    codes = np.searchsorted(between, (blocks * inverse[:, None]).reshape(-1)[:size], side="left")
    packed = np.full(size + size % 2, 7, np.uint8)
    packed[:size] = codes
    data: NDArray[np.uint8] = packed[::2] << np.uint8(4) | packed[1::2]
    return Nf4Matrix(rows, columns, block, data, absmax)


def dequantize_nf4(matrix: Nf4Matrix) -> NDArray[np.float32]:
    """The float32 ``[rows, columns]`` matrix that the NF4 one stands for."""
    size = matrix.rows * matrix.columns
    codes = np.stack((matrix.data >> 4, matrix.data & 0x0F), axis=-1).reshape(-1)[:size]
    values = NF4_VALUES[codes]
    values *= np.repeat(matrix.absmax, matrix.block)[:size]
    return values.reshape(matrix.rows, matrix.columns)
