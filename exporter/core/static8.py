"""Matrices for products in 8-bit integers: a scale per row, and a fixed scale for their inputs.

An input x becomes ``rint(x / input_scale) + input_zero`` in uint8; codes are uint8 around 128. Both
unsigned on purpose: on processors without VNNI (AVX2) onnxruntime's kernel for signed weights adds
pairs of products in 16 bits and saturates (an error of 10 per cent on normal data), the one for
unsigned weights does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CODES, ROW_SCALES = ".codes", ".row_scales"
INPUT_SCALE, INPUT_ZERO = ".input_scale", ".input_zero"
STATIC_CODE = "static"
MIDDLE = 128


@dataclass(frozen=True)
class StaticMatrix:
    """A ``[rows, columns]`` matrix with the quantization of what it is multiplied with.

    codes: uint8 ``[N, K]``, 128 for 0; scales: float32 ``[N]``; `input_scale` is positive,
    `input_zero` from 0 to 255.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    input_scale: float
    input_zero: int

    @property
    def rows(self) -> int:
        """N."""
        return int(self.codes.shape[0])

    @property
    def columns(self) -> int:
        """K."""
        return int(self.codes.shape[1])

    def stored(self, name: str) -> dict[str, NDArray[np.uint8] | NDArray[np.float32]]:
        """The tensors that store it under the name of its matrix."""
        return {
            name + CODES: self.codes,
            name + ROW_SCALES: self.scales,
            name + INPUT_SCALE: np.array([self.input_scale], np.float32),
            name + INPUT_ZERO: np.array([self.input_zero], np.uint8),
        }


def static_shapes(rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix to (safetensors dtype, shape) of the tensors that store a ``[rows, columns]`` matrix."""
    return {
        CODES: ("U8", (rows, columns)),
        ROW_SCALES: ("F32", (rows,)),
        INPUT_SCALE: ("F32", (1,)),
        INPUT_ZERO: ("U8", (1,)),
    }


def dequantize_static(matrix: StaticMatrix) -> NDArray[np.float32]:
    """The float32 ``[N, K]`` matrix that the codes stand for."""
    values = matrix.codes.astype(np.float32)
    values -= np.float32(MIDDLE)
    values *= matrix.scales[:, None]
    return values
