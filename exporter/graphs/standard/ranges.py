"""Which values of a graph float16 could not hold, found by running it on given inputs.

Layers whose values exceed its range have to stay in float32: these, on inputs like the model's own. It
says nothing about inputs that were not run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporter.core.errors import InputRefused
from exporter.families.base import Feed

FLOAT16_MAX = float(np.finfo(np.float16).max)
FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class WideValue:
    """A node whose values leave float16: its name, operator, largest magnitude and the reason."""

    node: str
    operator: str
    largest: float
    reason: str


def beyond_float16(
    path: Path, feeds: Iterable[Feed], *, kind: int = TensorProto.FLOAT
) -> tuple[WideValue, ...]:
    """Nodes of the graph file `path` with a value beyond 65504 on any of `feeds`, in graph order.

    `kind`: the type of the values that are looked at, FLOAT or FLOAT16 (which must not reach infinity).
    What masks add is left out: an engine replaces it. Raises `InputRefused` when the file is no graph
    or does not run on the inputs.
    """
    if not path.is_file():
        raise InputRefused(f"{path}: no such file; expected an exported graph")
    model = onnx.load_model(path, load_external_data=False)
    watched = _watch(model, kind)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Nodes are watched as they stand: fused ones have other values between them.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(FOLDER, str(path.parent))
    largest = dict.fromkeys(watched, 0.0)
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for feed in feeds:
            found = session.run([_largest(v) for v in watched], typed(session, feed))
            for value, number in zip(watched, found, strict=True):
                largest[value] = float(np.fmax(largest[value], number))
    except Exception as error:  # onnxruntime's errors have no common base class
        raise InputRefused(f"{path}: onnxruntime does not run it: {error}") from error
    return tuple(
        WideValue(
            node.name,
            node.op_type,
            largest[value],
            f"reaches {largest[value]:.4g}, float16 ends at {FLOAT16_MAX:.0f}",
        )
        for value, node in watched.items()
        if largest[value] > FLOAT16_MAX
    )


def typed(session: ort.InferenceSession, feed: Feed) -> dict[str, NDArray[Any]]:
    """`feed` with float16 where the graph takes it."""
    halves = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    return {n: a.astype(np.float16) if n in halves else a for n, a in feed.items()}


def _watch(model: onnx.ModelProto, kind: int) -> dict[str, onnx.NodeProto]:
    """Add to the graph the largest magnitude of each value of that type that depends on an input."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    moving = {i.name for i in graph.input}
    watched: dict[str, onnx.NodeProto] = {}
    for node in list(model.graph.node):
        if not moving.intersection(node.input):
            continue
        moving.update(node.output)
        if node.name != "mask" and not node.name.endswith("/masked"):
            watched.update({o: node for o in node.output if kinds.get(o) == kind})
    for value in watched:
        size, out = f"watch/{value}/size", _largest(value)
        model.graph.node.append(helper.make_node("Abs", [value], [size], name=size))
        model.graph.node.append(helper.make_node("ReduceMax", [size], [out], name=out, keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(out, kind, []))
    return watched


def _largest(value: str) -> str:
    return f"watch/{value}/largest"
