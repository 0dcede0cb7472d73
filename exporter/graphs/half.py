"""Turns exported graphs into float16 arithmetic, for GPUs.

onnxruntime's CUDA provider has GroupQueryAttention for float16 (and bfloat16) only
(onnxruntime/contrib_ops/cuda/bert/group_query_attention.cc): a decoder that computes in float32 would
run its attention on the CPU. Here the values between the operators become float16. Stored float16
weights lose the Cast behind them and stay where they are in the data file; keys and values are
float16; pixels, embeddings, features and logits cross the graphs' borders in float32 as before.
Angles of rotary positions stay float32 up to cosine and sine: float16 cannot hold place 2049.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporter.core.artifact import write_atomic
from exporter.core.digest import canonical_json
from exporter.core.errors import InputRefused
from exporter.graphs.texts import ADDED_SCORES

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
CACHED = re.compile(r"(past_key_values|present|cross_key_values)\.\d+\.(key|value)")
# What a masked place may have: far below any score, and finite after a score is added.
MASKED, LARGEST = 1e4, 65504.0
INLINE_MOST = 1 << 30
TURNING = ("Cos", "Sin")
# Operators whose outputs have the type of their first input (Where: of its second).
SAME_TYPE = frozenset(
    {
        "Add", "AveragePool", "BatchNormalization", "Concat", "Conv", "Cos", "Div", "Expand", "Gather",
        "LayerNormalization", "MatMul", "Max", "MaxPool", "Min", "Mul", "Neg", "Pad", "Range",
        "ReduceMax", "ReduceMean", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Sigmoid",
        "SimplifiedLayerNormalization", "Sin", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Tanh",
        "Transpose", "Unsqueeze", "BiasGelu", "FastGelu", "Gelu", "GroupQueryAttention", "MatMulBnb4",
        "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip
FIXED_TYPE = {"Shape": TensorProto.INT64, "Size": TensorProto.INT64} | dict.fromkeys(
    ("Equal", "GreaterOrEqual", "Less", "Not", "And"), TensorProto.BOOL
)


@dataclass(frozen=True)
class HalvedGraph:
    """What was done to one graph: tensors that became float16, nodes kept in float32."""

    name: str
    tensors: int
    kept: tuple[str, ...]


def halve_export(exported: Path) -> tuple[HalvedGraph, ...]:
    """Turn the graphs of an exported folder, in place, and say so in its export.json.

    Raises `InputRefused` as `halve_graph`, before any file is changed by it.
    """
    record = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    if record.get("dialect") != "ort":
        raise InputRefused(
            f"{exported}: dialect {record.get('dialect')!r}; float16 arithmetic is for 'ort'"
        )
    made = tuple(halve_graph(p) for p in sorted((exported / "model" / "onnx").glob("*.onnx")))
    write_atomic(exported / "export.json", canonical_json({**record, "compute": "float16"}))
    return made


def halve_graph(path: Path) -> HalvedGraph:
    """Turn one graph file, in place; its data file keeps what is still used.

    Raises `InputRefused` for an operator whose types are not known here and for a weight that
    float16 cannot hold.
    """
    model = onnx.load(path, load_external_data=False)
    halver = _Halver(path, model.graph)
    kept = halver.turn()
    data = model.SerializeToString(deterministic=True)
    write_atomic(path, data)
    if not any(t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer):
        path.with_name(f"{path.name}_data").unlink(missing_ok=True)
    return HalvedGraph(path.stem, halver.tensors, kept)


class _Halver:
    """One graph being turned. `_names` says under which name a value is read from here on."""

    def __init__(self, path: Path, graph: onnx.GraphProto) -> None:
        self._path, self._graph = path, graph
        self._names: dict[str, str] = {}
        self._kinds: dict[str, int] = {t.name: t.data_type for t in graph.initializer}
        self._kinds |= {i.name: i.type.tensor_type.elem_type for i in graph.input}
        self._kinds[""] = TensorProto.UNDEFINED
        for node in graph.node:
            self._kinds |= dict.fromkeys(node.output, self._output_kind(node))
        self._borders = {o.name for o in graph.output if self._kinds[o.name] == FLOAT}
        self._angles = self._before_turning()
        self._nodes: list[NodeProto] = []
        self.tensors = 0

    def turn(self) -> tuple[str, ...]:
        """Rewrite the graph; returns the names of the nodes that stay in float32."""
        self._turn_tensors()
        for value in self._graph.input:
            if self._kinds[value.name] == FLOAT:
                if CACHED.fullmatch(value.name):
                    value.type.tensor_type.elem_type = HALF
                else:
                    self._names[value.name] = self._cast(value.name, f"{value.name}/half", HALF)
        for node in self._graph.node:
            self._turn_node(node)
        for value in self._graph.output:
            if value.name in self._borders and CACHED.fullmatch(value.name):
                value.type.tensor_type.elem_type = HALF
        nodes = self._nodes
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(nodes)
        return tuple(n.name for n in nodes if n.name in self._angles)

    def _turn_node(self, node: NodeProto) -> None:
        made = NodeProto()
        made.CopyFrom(node)
        if node.name in self._angles:
            self._nodes.append(made)
            if node.op_type in TURNING:
                out = node.output[0]
                self._names[out] = self._cast(out, f"{out}/half", HALF)
            return
        del made.input[:]
        made.input.extend(self._names.get(i, i) for i in node.input)
        if node.op_type == "Cast" and _target(node) == FLOAT:
            source, out = node.input[0], node.output[0]
            if out in self._borders:
                self._nodes.append(made)
                return
            if self._kinds[source] in (FLOAT, HALF):
                self._names[out] = made.input[0]
                return
            made.attribute[0].i = HALF
        if node.op_type == "GroupQueryAttention":
            # CUDA's kernel is not known to take them; it comes from 1.24 on, where the window alone is right.
            del made.input[ADDED_SCORES:]
        self._nodes.append(made)
        for place, out in enumerate(node.output):
            if out in self._borders and not CACHED.fullmatch(out):
                made.output[place] = f"{out}/half"
                self._names[out] = made.output[place]
                self._cast(made.output[place], out, FLOAT)

    def _cast(self, source: str, out: str, kind: int) -> str:
        self._nodes.append(helper.make_node("Cast", [source], [out], name=f"{out}/cast", to=kind))
        return out

    def _output_kind(self, node: NodeProto) -> int:
        if node.op_type == "Cast":
            return _target(node)
        if node.op_type in FIXED_TYPE:
            return int(FIXED_TYPE[node.op_type])
        if node.op_type == "Where":
            return self._kinds[node.input[1]]
        if node.op_type == "GatherBlockQuantized":
            return self._kinds[node.input[2]]
        if node.op_type not in SAME_TYPE:
            raise InputRefused(
                f"{self._path.name}: '{node.name}' is {node.op_type}, which is not known to compute in "
                "float16; keep float32 arithmetic"
            )
        return self._kinds[node.input[0]]

    def _before_turning(self) -> set[str]:
        """Names of the nodes between integer positions and the cosines and sines of their angles."""
        makers = {out: node for node in self._graph.node for out in node.output}
        found: set[str] = set()
        waiting = [node for node in self._graph.node if node.op_type in TURNING]
        while waiting:
            node = waiting.pop()
            if node.name in found:
                continue
            found.add(node.name)
            floats = [i for i in node.input if self._kinds[i] == FLOAT and i in makers]
            waiting += [makers[i] for i in floats]
        return found

    def _turn_tensors(self) -> None:
        kept = {i for n in self._graph.node if n.name in self._angles for i in n.input}
        largest = sum(_size(t) for t in self._graph.initializer if t.name not in kept)
        if largest > INLINE_MOST:
            raise InputRefused(
                f"{self._path.name}: {largest / 1e9:.1f} GB of weights are float32; export them in "
                "float16 first (without --float32)"
            )
        for tensor in self._graph.initializer:
            if tensor.data_type == FLOAT and tensor.name not in kept:
                values = numpy_helper.to_array(tensor, str(self._path.parent))
                made = numpy_helper.from_array(self._halved(tensor.name, values), tensor.name)
                tensor.CopyFrom(made)
                self.tensors += 1

    def _halved(self, name: str, values: NDArray[Any]) -> NDArray[np.float16]:
        """Raises `InputRefused` unless all fit; a single number beyond is a mask's and is bounded."""
        if values.size == 1 and np.abs(values).max() > MASKED:
            values = np.clip(values, -MASKED, MASKED)
        largest = float(np.abs(values).max()) if values.size else 0.0
        if not largest <= LARGEST:
            raise InputRefused(
                f"{self._path.name}: '{name}' has values up to {largest:.3g}, float16 ends at 65504; "
                "keep float32 arithmetic"
            )
        return values.astype(np.float16)


def _target(node: NodeProto) -> int:
    return next(int(a.i) for a in node.attribute if a.name == "to")


def _size(tensor: TensorProto) -> int:
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return 4 * count if tensor.data_type == FLOAT else 0
