"""What TensorRT's parser takes: a table, and the check of a graph against it.

Source: onnx-tensorrt, docs/operators.md as of TensorRT 10.15 (opsets 9 to 24), and for packed
weights IDequantizeLayer and the "Quantization Schemes" page of TensorRT's documentation. A table on
paper: whether a given engine builder finds kernels for a graph is known only by running it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from exporter.core.errors import InputRefused
from exporter.graphs.standard.linear import INT4_BLOCKS
from exporter.graphs.standard.table import CHECKED, LIMITS, SOURCE, SUPPORTED

OPSETS = range(9, 25)
NAMES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.INT8: "INT8",
    TensorProto.INT4: "INT4",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.FLOAT4E2M1: "FP4",
    TensorProto.DOUBLE: "DOUBLE",
}
# Operators whose second input must be known when the engine is built.
FIXED_SECOND = ("CumSum", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class OperatorUse:
    """One operator of a graph: how often, on which types (of its first inputs), and what is wrong.

    `problem` is empty when the parser takes every one of them; `note`: a limit of the table that is
    not tested here.
    """

    domain: str
    name: str
    count: int
    types: tuple[str, ...]
    problem: str
    note: str


def list_operators(path: Path) -> tuple[OperatorUse, ...]:
    """Each operator of the graph file `path` held against the table, in order of first use.

    Raises `InputRefused` when the file is no graph or its opset is not one of the parser's.
    """
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected an exported graph")
    model = onnx.load_model(path, load_external_data=False)
    opsets = {o.domain: o.version for o in model.opset_import}
    version = opsets.get("", 0)
    if version not in OPSETS:
        raise InputRefused(
            f"{path}: opset {version}; TensorRT's parser takes {OPSETS[0]} to {OPSETS[-1]}"
        )
    facts = _Facts(model)
    uses: dict[tuple[str, str], list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        uses.setdefault((node.domain, node.op_type), []).append(node)
    return tuple(_use(key, nodes, facts) for key, nodes in uses.items())


def require_supported(path: Path) -> dict[str, int]:
    """How often each operator of `path` occurs. Raises `InputRefused` naming the first not taken."""
    uses = list_operators(path)
    for use in uses:
        if use.problem:
            raise InputRefused(
                f"{path}: {use.problem}; TensorRT's parser does not take it ({SOURCE})"
            )
    return {use.name: use.count for use in sorted(uses, key=lambda u: u.name)}


class _Facts:
    """Types of values, and what is known of constants, in one graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.constants: Mapping[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.types: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            self.types[value.name] = value.type.tensor_type.elem_type

    def type_of(self, value: str) -> str:
        """The parser's word for the type of `value`, "unknown" where inference finds none."""
        kind = self.types.get(value, TensorProto.UNDEFINED)
        return NAMES.get(kind, "unknown" if not kind else TensorProto.DataType.Name(kind))


def _use(key: tuple[str, str], nodes: list[onnx.NodeProto], facts: _Facts) -> OperatorUse:
    domain, op = key
    types = Counter(facts.type_of(n.input[0]) for n in nodes if n.input and n.input[0])
    problem = next((p for n in nodes for p in _problems(n, facts)), "")
    note = LIMITS.get(op, "") if op not in CHECKED else ""
    return OperatorUse(domain, op, len(nodes), tuple(sorted(types)), problem, note)


def _problems(node: onnx.NodeProto, facts: _Facts) -> Iterator[str]:
    """What the parser does not take about one node."""
    op, where = node.op_type, f"node '{node.name}' ({node.op_type})"
    if node.domain not in ("", "ai.onnx"):
        yield f"{where} is of the domain {node.domain}"
        return
    if op not in SUPPORTED:
        yield f"{where} is no operator of the table"
        return
    first = facts.type_of(node.input[0]) if node.input and node.input[0] else ""
    if first and first not in SUPPORTED[op]:
        yield f"{where} has {first} values, expected {', '.join(SUPPORTED[op])}"
    if op in FIXED_SECOND or op.startswith("Reduce"):
        known = len(node.input) < 2 or not node.input[1] or node.input[1] in facts.constants
        if not known:
            yield f"{where} has axes that the graph computes"
    if op == "LayerNormalization" and any(node.output[1:]):
        yield f"{where} gives more than the normalised values"
    if op == "Attention":
        yield from _attention(node, where)
    if op == "TensorScatter" and _attribute(node, "axis", -2) != -2:
        yield f"{where} has another axis than -2"
    if op == "DequantizeLinear":
        yield from _dequantize(node, where, facts)


def _attention(node: onnx.NodeProto, where: str) -> Iterator[str]:
    if any(node.input[4:]):
        yield f"{where} has past keys or values"
    if any(node.output[1:]):
        yield f"{where} gives keys or values"
    if _attribute(node, "softcap", 0.0) or _attribute(node, "qk_matmul_output_mode", 0):
        yield f"{where} has softcap or a scores output"


def _dequantize(node: onnx.NodeProto, where: str, facts: _Facts) -> Iterator[str]:
    scale = facts.constants.get(node.input[1])
    if len(node.input) > 2 and node.input[2]:
        zero = facts.constants.get(node.input[2])
        if zero is None or any(_bytes(zero)):
            yield f"{where} has a zero point other than 0"
    if scale is None:
        yield f"{where} has scales that the graph computes"
        return
    known = None if scale.external_data else onnx.numpy_helper.to_array(scale)
    if known is not None and not (known > 0).all():
        yield f"{where} has scales that are not above 0"
    codes = facts.constants.get(node.input[0])
    block = int(_attribute(node, "block_size", 0))
    if codes is None:
        return
    sizes = list(zip(codes.dims, scale.dims, strict=False)) if block else []
    if any(c not in (s, s * block) for c, s in sizes) or sum(c != s for c, s in sizes) > 1:
        yield f"{where} has blocks along more than one axis, or broken ones"
    if codes.data_type == TensorProto.INT4 and block not in INT4_BLOCKS:
        yield f"{where} has 4-bit blocks of other sizes than 64 and 128"
    if codes.data_type == TensorProto.INT4 and codes.dims[-1] % 2:
        yield f"{where} has 4-bit values in rows of odd length"


def _bytes(tensor: TensorProto) -> bytes:
    return bytes(onnx.numpy_helper.to_array(tensor).tobytes())


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    found = [a for a in node.attribute if a.name == name]
    value = onnx.helper.get_attribute_value(found[0]) if found else default
    return float(value)
