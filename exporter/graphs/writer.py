"""Builds one ONNX file node by node; weights go straight to disk, so only one is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.graphs.dialect import Attributes, Dialect, OpenDialect

OPSET = 21
# IR version of ONNX 1.16, the first with opset 21; newer ones are refused by older runtimes.
IR_VERSION = 10
MICROSOFT = "com.microsoft"
# Operators that onnxruntime registers in the standard domain, though ai.onnx has none of the name.
HIDDEN_CONTRIB = frozenset({"SimplifiedLayerNormalization"})
# Graphs with more weight bytes than this keep them in a file of their own (protobuf ends at 2 GB).
INLINE_LIMIT = 64 << 20
# Page size: lets a runtime map each weight without copying it.
ALIGNMENT = 4096
SMALL = 1024
DATA_SUFFIX = ".onnx_data"

Shape = Sequence[int | str]


@dataclass(frozen=True)
class WrittenGraph:
    """One finished file: sizes in bytes; `data_bytes` is 0 when the weights are inside the graph."""

    name: str
    graph_bytes: int
    data_bytes: int
    weight_bytes: int
    nodes: int


@dataclass(frozen=True)
class _Stored:
    tensor: TensorProto
    offset: int
    length: int


class GraphWriter:
    """Collects nodes in order and writes `folder/<name>.onnx` (+ `<name>.onnx_data`).

    The bytes depend only on the calls made: names, order and values. Use as a context manager:
    when the block fails, the data file is removed. `dialect`: what says onnxruntime's own operators
    in those of ai.onnx; without one they are written as they are.
    """

    def __init__(self, folder: Path, name: str, *, dialect: OpenDialect | None = None) -> None:
        self.name = name
        self.dialect: Dialect | None = None if dialect is None else dialect(self)
        self._domains = {"": OPSET, MICROSOFT: 1} if dialect is None else {"": OPSET}
        self._folder = folder
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._stored: dict[str, _Stored] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._data_path = folder / f"{name}{DATA_SUFFIX}"
        self._data = self._data_path.open("w+b")
        self._end = 0

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        """Declare a graph input; strings in `shape` are symbolic sizes."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Shape) -> str:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        attributes: Attributes | None = None,
    ) -> str:
        """Append a node; its outputs are `outputs`, by default one named ``<name>:0``. Returns the first."""
        names = [f"{name}:0"] if outputs is None else list(outputs)
        if self.dialect is not None and (domain == MICROSOFT or op in HIDDEN_CONTRIB):
            self.dialect.lowered(op, name, inputs, names, attributes or {})
            return names[0]
        made = helper.make_node(op, list(inputs), names, name=name, domain=domain)
        for key, value in sorted((attributes or {}).items()):
            made.attribute.append(helper.make_attribute(key, value))
        self._nodes.append(made)
        return names[0]

    def shape(self, name: str) -> Shape | None:
        """Shape of a declared graph input, None for any other value."""
        for known in self._inputs:
            if known.name == name:
                return [d.dim_param or d.dim_value for d in known.type.tensor_type.shape.dim]
        return None

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A small tensor inside the graph. Asking again for the same name needs the same values."""
        tensor = onnx.numpy_helper.from_array(np.asarray(values, order="C"), name)
        known = self._constants.setdefault(name, tensor)
        if known != tensor:
            raise ValueError(f"constant '{name}' is declared twice with different values")
        return name

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """A weight: written to the data file at once, so the caller may drop it."""
        if values.nbytes < SMALL:
            return self.constant(name, values)
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        return self.packed(name, dtype, values.shape, values)

    def packed(self, name: str, dtype: int, shape: Sequence[int], data: NDArray[Any]) -> str:
        """A weight of ONNX type `dtype` whose bytes are those of `data`: for types that numpy lacks."""
        if name in self._stored:
            raise ValueError(f"weight '{name}' is written twice")
        tensor = TensorProto(name=name, dims=list(shape), data_type=dtype)
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._data.write(b"\0" * (offset - self._end))
        self._data.write(np.ascontiguousarray(data).data)
        self._end = offset + data.nbytes
        self._stored[name] = _Stored(tensor, offset, data.nbytes)
        return name

    def finish(self) -> WrittenGraph:
        """Write the graph file; small graphs take their weights in. Raises ValueError on a broken graph."""
        _check_names(self._nodes, self._known(), [o.name for o in self._outputs])
        if strange := {n.domain for n in self._nodes} - self._domains.keys():
            raise ValueError(f"operators of {sorted(strange)} in a graph without them")
        weights = sum(s.length for s in self._stored.values())
        inline = weights <= INLINE_LIMIT
        tensors = [self._placed(s, inline) for s in self._stored.values()]
        self._data.close()
        if inline:
            self._data_path.unlink()
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            [*self._constants.values(), *tensors],
        )
        opsets = [helper.make_opsetid(*domain) for domain in self._domains.items()]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="medexport"
        )
        data = model.SerializeToString(deterministic=True)
        (self._folder / f"{self.name}.onnx").write_bytes(data)
        external = 0 if inline else self._end
        return WrittenGraph(self.name, len(data), external, weights, len(self._nodes))

    def _known(self) -> list[str]:
        return [*(i.name for i in self._inputs), *self._constants, *self._stored]

    def _placed(self, stored: _Stored, inline: bool) -> TensorProto:
        tensor = stored.tensor
        if inline:
            self._data.seek(stored.offset)
            tensor.raw_data = self._data.read(stored.length)
            return tensor
        tensor.data_location = TensorProto.EXTERNAL
        place = {
            "location": self._data_path.name,
            "offset": str(stored.offset),
            "length": str(stored.length),
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._data.close()
        if kind is not None:
            self._data_path.unlink(missing_ok=True)


def _check_names(nodes: Sequence[onnx.NodeProto], known: list[str], outputs: list[str]) -> None:
    # Each value is made once and before its first use; a typing error must not reach the runtime.
    seen = set(known)
    if len(seen) != len(known):
        raise ValueError("an input, constant or weight name is used twice")
    used: set[str] = set(outputs)
    for node in nodes:
        lost = [i for i in node.input if i and i not in seen]
        again = [o for o in node.output if o and o in seen]
        if lost or again:
            raise ValueError(f"node '{node.name}': unknown inputs {lost}, repeated outputs {again}")
        seen.update(o for o in node.output if o)
        used.update(node.input)
    if idle := [n for n in known if n not in used]:
        raise ValueError(f"never used: {idle[:3]}")
    if missing := [o for o in outputs if o not in seen]:
        raise ValueError(f"graph outputs that nothing computes: {missing[:3]}")
