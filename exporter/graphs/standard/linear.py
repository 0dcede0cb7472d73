"""Weights in the standard dialect: float behind Cast, blocks behind DequantizeLinear.

TensorRT reads a packed matrix under more conditions than ONNX states: zero point 0, scales above 0
(`IDequantizeLayer`), 4-bit blocks of 64 or 128 values (its "Quantization Schemes" page) and an even
last axis (onnx-tensorrt, `QuantDequantLinearHelper`). What breaks one is stored in the next wider
form that holds exactly the same values, or refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix, unpack
from exporter.core.errors import InputRefused
from exporter.graphs.linear import float_weight, transposed
from exporter.graphs.matrices import Matrix
from exporter.graphs.writer import GraphWriter

# Values that share a scale: what TensorRT takes for 4 bits.
INT4_BLOCKS = (64, 128)


@dataclass(frozen=True)
class SignedBlocks:
    """A packed matrix with zero point 0 and scales above 0: ``codes * scales``.

    codes: int8 ``[rows, blocks * block]``; scales: float32 ``[rows, blocks]``; `bits` 4 or 8;
    `widened`: why 8 bits where the source has 4, or empty.
    """

    bits: int
    block: int
    columns: int
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    widened: str = ""


def signed_blocks(name: str, matrix: PackedMatrix) -> SignedBlocks:
    """The same values as `matrix` in TensorRT's form. Raises `InputRefused` where there is none.

    A block with a negative scale is turned over; one of 4 bits that uses the least code then needs
    the value 8, which 4 signed bits lack, so that the matrix is stored in 8 bits.
    """
    form = matrix.format
    if matrix.zero_points is not None:
        raise InputRefused(
            f"matrix '{name}' has asymmetric blocks; the standard dialect takes symmetric ones only: "
            "quantize with --symmetric, or export with --dialect ort"
        )
    codes = unpack(matrix.qdata, form.bits, form.block).astype(np.int16) - form.middle
    scales = matrix.scales.astype(np.float32)
    codes[scales == 0] = 0
    codes[scales < 0] *= -1
    scales = np.where(scales == 0, np.float32(1), np.abs(scales))
    bits, widened = form.bits, ""
    if codes.max(initial=0) > 127:
        raise InputRefused(
            f"matrix '{name}' has 8-bit blocks with negative scales and the code -128, which TensorRT "
            "cannot hold; quantize it with int8, or export with --dialect ort"
        )
    if bits == 4 and codes.max(initial=0) >= form.middle:
        bits, widened = (
            8,
            "negative block scales, which TensorRT does not take; a -pos scheme has none",
        )
    elif bits == 4 and form.block < INT4_BLOCKS[0]:
        bits, widened = 8, f"4-bit blocks of {form.block}; TensorRT takes 64 and 128"
    elif bits == 4 and matrix.rows % 2:
        bits, widened = 8, f"{matrix.rows} rows; TensorRT takes an even number in 4 bits"
    block = form.block
    if bits == 4 and block > INT4_BLOCKS[1]:
        scales, block = np.repeat(scales, block // INT4_BLOCKS[1], axis=1), INT4_BLOCKS[1]
    flat = codes.astype(np.int8).reshape(matrix.rows, -1)
    return SignedBlocks(bits, block, matrix.columns, flat, scales, widened)


class Weights:
    """Writes matrices into one graph; `widened` collects which were stored wider, and why.

    `half`: blocks become float16 and float32 behind that, so that an engine can stay in float16.
    """

    def __init__(self, writer: GraphWriter, *, half: bool = False) -> None:
        self.writer, self._half = writer, half
        self.widened: dict[str, str] = {}

    def product(self, name: str, x: str, matrix: Matrix, *, output: str | None = None) -> str:
        """``x @ matrix.T`` for x ``[..., columns]``; `output` names the result. Raises `InputRefused`."""
        if isinstance(matrix, PackedMatrix):
            weight = self.dequantized(name, matrix, turned=True)
        elif isinstance(matrix, np.ndarray):
            weight = float_weight(self.writer, f"{name}.weight", transposed(matrix))
        else:
            raise InputRefused(
                f"'{name}' is stored as {type(matrix).__name__}, which only onnxruntime's own operators "
                "read; choose another scheme, or export with --dialect ort"
            )
        outputs = None if output is None else [output]
        return self.writer.node("MatMul", name, [x, weight], outputs=outputs)

    def dequantized(self, name: str, matrix: PackedMatrix, *, turned: bool) -> str:
        """The float32 matrix ``[rows, columns]``, or with `turned` ``[columns, rows]``."""
        blocks = signed_blocks(name, matrix)
        if blocks.widened:
            self.widened[name] = blocks.widened
        axis = 0 if turned else 1
        codes, scales = blocks.codes, blocks.scales
        if turned:
            codes, scales = np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T)
        dtype = TensorProto.INT4 if blocks.bits == 4 else TensorProto.INT8
        data = _nibbles(codes) if blocks.bits == 4 else codes.view(np.uint8)
        if self._half:
            scales = scales.astype(np.float16)  # exact: they come from float16
        inputs = [
            self.writer.packed(f"{name}.codes", dtype, codes.shape, data),
            self.writer.weight(f"{name}.scales", scales),
        ]
        attributes = {"axis": axis, "block_size": blocks.block}
        made = self.writer.node("DequantizeLinear", f"{name}/float", inputs, attributes=attributes)
        if codes.shape[axis] != blocks.columns:
            # Rows were padded to whole blocks; ends that are constants are folded when a graph is built.
            ends = self.writer.constant(f"{name}/columns", np.array([blocks.columns], np.int64))
            zero, where = (
                self.writer.constant(f"index/{n}", np.array([n], np.int64)) for n in (0, axis)
            )
            made = self.writer.node("Slice", f"{name}/unpadded", [made, zero, ends, where])
        if not self._half:
            return made
        kind = {"to": TensorProto.FLOAT}
        return self.writer.node("Cast", f"{name}/cast", [made], attributes=kind)


def _nibbles(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Signed 4-bit codes two to a byte in row-major order, the first one low."""
    pairs: NDArray[np.uint8] = codes.reshape(-1, 2).view(np.uint8) & np.uint8(0x0F)
    return pairs[:, 0] | pairs[:, 1] << np.uint8(4)
