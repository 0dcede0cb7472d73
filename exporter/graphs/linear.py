"""Weights as graph values: float matrices behind Cast, packed ones as MatMulNBits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporter.core.blocks import PackedMatrix
from exporter.core.nf4 import Nf4Matrix
from exporter.core.static8 import StaticMatrix
from exporter.graphs.matrices import FloatArray, GatedMatrix, Matrix, WatchedMatrix
from exporter.graphs.static import blend, linear_static, watch
from exporter.graphs.writer import MICROSOFT, GraphWriter


def float_weight(writer: GraphWriter, name: str, values: NDArray[Any]) -> str:
    """A float weight for float32 arithmetic; float16 gets a Cast, which onnxruntime folds at load."""
    stored = writer.weight(name, values)
    if values.dtype == np.float32:
        return stored
    return writer.node("Cast", f"{name}/cast", [stored], attributes={"to": TensorProto.FLOAT})


def linear(
    writer: GraphWriter,
    name: str,
    x: str,
    matrix: Matrix,
    accuracy_level: int,
    *,
    output: str | None = None,
) -> str:
    """``x @ matrix.T`` for x ``[..., columns]``; `matrix` is ``[rows, columns]`` as in a checkpoint.

    `accuracy_level` (packed matrices only): 0 computes in float32, 4 rounds each block of
    activations to int8 (onnxruntime's MatMulNBits). At 0 the kernel unpacks an 8-bit matrix anew
    in each call: little beside a thousand rows of x, ruinous for one. `output` names the result.
    """
    if writer.dialect is not None:
        return writer.dialect.product(name, x, matrix, output)
    outputs = None if output is None else [output]
    if isinstance(matrix, Nf4Matrix):
        return _linear_nf4(writer, name, x, matrix, outputs)
    if isinstance(matrix, StaticMatrix):
        return linear_static(writer, name, x, matrix, outputs)
    if isinstance(matrix, WatchedMatrix | GatedMatrix):
        return _linear_observed(writer, name, x, matrix, accuracy_level, output)
    if not isinstance(matrix, PackedMatrix):
        # Turned here: a Transpose node would be folded at load, for twice the memory.
        weight = float_weight(writer, f"{name}.weight", transposed(matrix))
        return writer.node("MatMul", name, [x, weight], outputs=outputs)
    form = matrix.format
    inputs = [
        x,
        writer.weight(f"{name}.qdata", matrix.qdata),
        float_weight(writer, f"{name}.scales", matrix.scales),
    ]
    if matrix.zero_points is not None:
        inputs.append(writer.weight(f"{name}.zero_points", matrix.zero_points))
    return writer.node(
        "MatMulNBits",
        name,
        inputs,
        domain=MICROSOFT,
        outputs=outputs,
        attributes={
            "K": matrix.columns,
            "N": matrix.rows,
            "bits": form.bits,
            "block_size": form.block,
            "accuracy_level": accuracy_level,
        },
    )


def _linear_observed(
    writer: GraphWriter,
    name: str,
    x: str,
    matrix: WatchedMatrix | GatedMatrix,
    accuracy_level: int,
    output: str | None,
) -> str:
    """A float matrix of which calibration sees the inputs, or that it switches to 8 bits."""
    if isinstance(matrix, WatchedMatrix):
        watch(writer, x, matrix)
        return linear(writer, name, x, matrix.values, accuracy_level, output=output)
    plain = linear(writer, f"{name}/float", x, matrix.values, accuracy_level)
    static = linear_static(writer, f"{name}/static", x, matrix.static, None)
    return blend(writer, name, matrix, plain, static, output)


def _linear_nf4(
    writer: GraphWriter, name: str, x: str, matrix: Nf4Matrix, outputs: list[str] | None
) -> str:
    """NF4 of bitsandbytes as onnxruntime's MatMulBnb4 (quant_type 1), which computes in float32."""
    return writer.node(
        "MatMulBnb4",
        name,
        [
            x,
            writer.weight(f"{name}.nf4", matrix.data),
            writer.weight(f"{name}.absmax", matrix.absmax),
        ],
        domain=MICROSOFT,
        outputs=outputs,
        attributes={
            "K": matrix.columns,
            "N": matrix.rows,
            "block_size": matrix.block,
            "quant_type": 1,
        },
    )


def transposed(matrix: FloatArray) -> FloatArray:
    """``matrix.T``, contiguous."""
    # In strips: numpy's whole-matrix transpose misses the cache on each element of a large matrix.
    rows, columns = matrix.shape
    turned = np.empty((columns, rows), matrix.dtype)
    for start in range(0, rows, 256):
        turned[:, start : start + 256] = matrix[start : start + 256].T
    return turned
