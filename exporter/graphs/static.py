"""Products in 8-bit integers, and the graphs that they are chosen by.

A watched matrix shows the range of its inputs; a gated one is there in float and in 8 bits, and an
input of the graph says which of the two counts.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from exporter.core.static8 import MIDDLE, StaticMatrix
from exporter.graphs.matrices import GatedMatrix, WatchedMatrix
from exporter.graphs.writer import MICROSOFT, GraphWriter

# Every so many inputs one is kept: about 33 of a tile of 1024 patches.
STRIDE = 31
LARGEST = np.iinfo(np.int64).max


def linear_static(
    writer: GraphWriter, name: str, x: str, matrix: StaticMatrix, outputs: list[str] | None
) -> str:
    """``x @ matrix.T`` by QuantizeLinear and onnxruntime's MatMulIntegerToFloat, in unsigned 8 bits."""
    scale = writer.constant(f"{name}.input_scale", np.array(matrix.input_scale, np.float32))
    zero = writer.constant(f"{name}.input_zero", np.array(matrix.input_zero, np.uint8))
    coded = writer.node("QuantizeLinear", f"{name}/codes", [x, scale, zero])
    inputs = [
        coded,
        writer.weight(f"{name}.codes", np.ascontiguousarray(matrix.codes.T)),
        scale,
        writer.weight(f"{name}.row_scales", matrix.scales),
        zero,
        writer.constant("static/middle", np.array(MIDDLE, np.uint8)),
    ]
    return writer.node("MatMulIntegerToFloat", name, inputs, domain=MICROSOFT, outputs=outputs)


def watch_output(name: str, what: str) -> str:
    """The graph output with `what` ("low", "high", "rows") of the inputs of the matrix `name`."""
    return f"watch/{name}/{what}"


def gate_input(name: str) -> str:
    """The graph input, float32 ``[1]``, that puts the matrix `name` into 8 bits."""
    return f"gate/{name}"


def watch(writer: GraphWriter, x: str, matrix: WatchedMatrix) -> None:
    """Declare least and greatest input of each channel ``[K]``, and some inputs ``[R, K]``, as outputs."""
    name, columns = matrix.names[0], matrix.values.shape[1]
    shape = writer.constant(f"{name}/flat", np.array([-1, columns], np.int64))
    flat = writer.node("Reshape", f"{name}/flat_inputs", [x, shape])
    bounds = {"watch/start": 0, "watch/end": LARGEST, "watch/axis": 0, "watch/step": STRIDE}
    picked = [writer.constant(n, np.array([v], np.int64)) for n, v in bounds.items()]
    steps = (
        ("low", "ReduceMin", [flat, "watch/axis"]),
        ("high", "ReduceMax", [flat, "watch/axis"]),
        ("rows", "Slice", [flat, *picked]),
    )
    for what, op, inputs in steps:
        sizes = [f"{name}/rows", columns] if what == "rows" else [columns]
        attributes = {} if what == "rows" else {"keepdims": 0}
        for other in matrix.names:
            # Stacked matrices read the same, and say so each by itself.
            out = writer.output(watch_output(other, what), TensorProto.FLOAT, sizes)
            writer.node(op, out, inputs, outputs=[out], attributes=attributes)


def blend(
    writer: GraphWriter, name: str, matrix: GatedMatrix, plain: str, static: str, output: str | None
) -> str:
    """``plain + gate * (static - plain)``: exactly one of them for a gate of 0 or 1."""
    gate = writer.input(gate_input(matrix.names[0]), TensorProto.FLOAT, [1])
    change = writer.node("Sub", f"{name}/change", [static, plain])
    part = writer.node("Mul", f"{name}/part", [change, gate])
    return writer.node("Add", name, [plain, part], outputs=None if output is None else [output])
