"""Float16 arithmetic for a standard graph: what an engine of a strongly typed network computes in.

TensorRT takes precisions from the graph. Products, convolutions, activations and residuals become
float16 here; what sums squares, exponentials or positions stays float32 (norms, softmax, masks, angles),
and so does every node whose values were found to leave float16, with what reads them. Weights stay where
they lie: stored float16 loses the Cast behind it. Past and present become float16 (in float32 the cache
would be cast anew for every token); all other inputs and outputs keep their types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporter.core.artifact import write_atomic
from exporter.graphs.standard.ranges import FLOAT16_MAX

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
CACHE = re.compile(r"(past_key_values|present)\.\d+\.(key|value)")
# What is summed or compared here loses its meaning in 11 bits, or leaves the range at ordinary inputs.
WIDE_OPERATORS = frozenset(
    {"BatchNormalization", "Cos", "CumSum", "Div", "GreaterOrEqual", "LayerNormalization", "Less"}
    | {"Max", "Range", "ReduceMax", "ReduceMean", "ReduceSum", "Sin", "Softmax", "Sqrt", "Where"}
)
# What reads these belongs to them: a norm's epsilon and weight, a mask's sum with scores.
WIDE_SOURCES = frozenset({"Div", "ReduceMean", "Where"})
# Reads any type and gives none.
ANY_TYPE = frozenset({"Shape"})


def to_float16(path: Path, found: Mapping[str, str]) -> dict[str, str]:
    """Turn the standard graph file `path`, in place; its data file is not touched.

    `found`: nodes whose values leave float16, and the reason (`ranges.beyond_float16`). Returns the nodes
    that stay in float32 for that, with the reason: these, unless they would anyway, and what reads them.
    """
    model = onnx.load_model(path, load_external_data=False)
    turned = _Turned(path, model, found)
    turned.turn()
    write_atomic(path, model.SerializeToString(deterministic=True))
    return turned.kept


class _Turned:
    """One graph on its way. A value is known in float32, in float16 or in both forms."""

    def __init__(self, path: Path, model: onnx.ModelProto, found: Mapping[str, str]) -> None:
        self._path, self._graph, self._found = path, model.graph, found
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self._kinds = {t.name: t.data_type for t in self._graph.initializer}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            self._kinds[value.name] = value.type.tensor_type.elem_type
        self._tensors = {t.name: t for t in self._graph.initializer}
        self._outputs = {o.name for o in self._graph.output}
        self._sources = {out: node for node in self._graph.node for out in node.output}
        self._half: dict[str, str] = {}
        self._full: dict[str, str] = {i.name: i.name for i in self._graph.input}
        # Casts of stored float16 weights: written only where somebody needs float32.
        self._casts: dict[str, NodeProto] = {}
        self._active = {i.name for i in self._graph.input if self._kinds[i.name] == FLOAT}
        self._beyond: set[str] = set()
        self._nodes: list[NodeProto] = []
        self._stored: list[TensorProto] = []
        self.kept: dict[str, str] = {}

    def turn(self) -> None:
        """Rewrite the graph."""
        halves = self._turn_cache()
        for node in self._graph.node:
            self._turn_node(node, halves)
        used = {name for node in self._nodes for name in node.input}
        tensors = [t for t in (*self._graph.initializer, *self._stored) if t.name in used]
        del self._graph.node[:], self._graph.initializer[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)
        self._graph.initializer.extend(tensors)

    def _turn_cache(self) -> set[str]:
        """Declare past and present in float16 where all of them fit; returns the outputs."""
        made = {o for o in self._outputs if CACHE.fullmatch(o)}
        if any(self._sources[o].name in self._found for o in made):
            return set()
        for value in (*self._graph.input, *self._graph.output):
            if CACHE.fullmatch(value.name):
                value.type.tensor_type.elem_type = HALF
                if value.name not in made:
                    self._half[value.name] = value.name
                    del self._full[value.name]
        return made

    def _turn_node(self, node: NodeProto, halves: set[str]) -> None:
        floats = [i for i in node.input if self._kinds.get(i) == FLOAT]
        gives = [o for o in node.output if self._kinds.get(o) == FLOAT]
        if node.op_type == "Cast" and gives and self._kinds.get(node.input[0]) == HALF:
            self._half[node.output[0]] = node.input[0]
            self._casts[node.output[0]] = node
            if node.output[0] in self._outputs:
                self._in_full(node.output[0])
            return
        if not floats and not gives:
            self._nodes.append(node)
        elif node.op_type in ANY_TYPE:
            source = node.input[0]
            known = self._half.get(source) if source not in self._full else None
            self._append(node, [known or source], list(node.output))
        elif self._narrow(node, floats):
            self._write_half(node, gives, halves)
        else:
            self._append(node, [self._in_full(i) for i in node.input], list(node.output))
            self._full.update({o: o for o in gives})
        if self._active.intersection(floats):
            self._active.update(gives)

    def _narrow(self, node: NodeProto, floats: list[str]) -> bool:
        """Whether the node computes in float16; says why not where its values are the reason."""
        moving = self._active.intersection(floats) or any(self._stored_in_half(i) for i in floats)
        if not moving or node.op_type in WIDE_OPERATORS or self._belongs_to_norm_or_mask(node):
            if node.name in self._found:
                self._beyond.update(node.output)
            return False
        if node.name in self._found:
            self.kept[node.name] = self._found[node.name]
            self._beyond.update(node.output)
            return False
        if wide := next((i for i in floats if i in self._beyond), None):
            self.kept[node.name] = f"reads what '{self._sources[wide].name}' gives"
            return False
        if heavy := next((i for i in floats if not self._fits(i)), None):
            self.kept[node.name] = f"its weight '{heavy}' goes beyond {FLOAT16_MAX:.0f}"
            return False
        return True

    def _belongs_to_norm_or_mask(self, node: NodeProto) -> bool:
        if node.op_type == "Mul" and node.input[0] == node.input[1]:
            return True  # the square of a norm
        sources = (self._sources.get(i) for i in node.input)
        return any(s is not None and s.op_type in WIDE_SOURCES for s in sources)

    def _stored_in_half(self, value: str) -> bool:
        """Whether a value that no input moves is stored in float16."""
        return value in self._casts or (value in self._half and value not in self._full)

    def _fits(self, value: str) -> bool:
        tensor = self._tensors.get(value)
        if tensor is None or tensor.data_type != FLOAT:
            return True
        return bool(np.abs(self._array(tensor)).max(initial=0) <= FLOAT16_MAX)

    def _write_half(self, node: NodeProto, gives: list[str], halves: set[str]) -> None:
        inputs = [self._in_half(i) if self._kinds.get(i) == FLOAT else i for i in node.input]
        # A float32 output of the graph is what the value in float16 is cast to.
        names = {o: f"{o}/float16" for o in gives if o in self._outputs and o not in halves}
        self._append(node, inputs, [names.get(o, o) for o in node.output])
        for value in gives:
            self._half[value] = names.get(value, value)
            if value in names:
                self._cast(names[value], value, FLOAT)
                self._full[value] = value

    def _in_half(self, value: str) -> str:
        """The name of `value` in float16, cast here where it has none."""
        if value not in self._half:
            name = f"{value}/float16"
            tensor = self._tensors.get(value)
            if tensor is None:
                self._cast(value, name, HALF)
            else:
                half = self._array(tensor).astype(np.float16)
                self._stored.append(numpy_helper.from_array(half, name))
            self._half[value] = name
        return self._half[value]

    def _in_full(self, value: str) -> str:
        """The name of `value` in float32 (of any other type: its own)."""
        if value in self._full or value not in self._half or value in self._tensors:
            return self._full.get(value, value)
        if value in self._casts:
            self._nodes.append(self._casts[value])
            self._full[value] = value
        else:
            self._cast(self._half[value], f"{value}/float32", FLOAT)
            self._full[value] = f"{value}/float32"
        return self._full[value]

    def _array(self, tensor: TensorProto) -> NDArray[np.float32]:
        return np.asarray(numpy_helper.to_array(tensor, str(self._path.parent)), np.float32)

    def _cast(self, source: str, name: str, kind: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [name], name=name, to=kind))

    def _append(self, node: NodeProto, inputs: list[str], outputs: list[str]) -> None:
        made = NodeProto()
        made.CopyFrom(node)
        del made.input[:], made.output[:]
        made.input.extend(inputs)
        made.output.extend(outputs)
        self._nodes.append(made)
