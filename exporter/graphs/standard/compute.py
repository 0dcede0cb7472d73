"""Turns exported standard graphs into float16 arithmetic by what running them shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto
from PIL.Image import Image

from exporter.core.errors import ParityFailed
from exporter.families.base import Feed
from exporter.graphs.standard.examples import drawn_images, example_feeds
from exporter.graphs.standard.float16 import to_float16
from exporter.graphs.standard.ranges import beyond_float16, typed
from exporter.graphs.writer import WrittenGraph


@dataclass(frozen=True)
class Float16Graphs:
    """The graphs as they are now; per graph the nodes kept in float32 with the reason, and the largest
    difference of an output from float32's on the first example, as a share of its largest value.
    """

    parts: tuple[WrittenGraph, ...]
    kept: Mapping[str, Mapping[str, str]]
    difference: Mapping[str, float]


def compute_in_float16(
    model: Path, parts: Sequence[WrittenGraph], images: Sequence[Image], prompt: str
) -> Float16Graphs:
    """Turn the graphs of the exported folder `model`, in place.

    Each is run in float32 on `images` (none: drawn ones) behind `prompt`; nodes whose values leave float16
    stay in float32. Raises `ParityFailed` when a value of a turned graph leaves float16 nevertheless.
    """
    feeds = example_feeds(model, images or drawn_images(), prompt)
    turned, kept, difference = [], {}, {}
    for part in parts:
        path = model / "onnx" / f"{part.name}.onnx"
        found = {v.node: v.reason for v in beyond_float16(path, feeds[part.name])}
        expected = _outputs(path, feeds[part.name][:1])[0]
        kept[part.name] = to_float16(path, found)
        _require_finite(path, feeds[part.name])
        got = _outputs(path, feeds[part.name][:1])[0]
        difference[part.name] = max(_difference(got[n], v) for n, v in expected.items())
        nodes = len(onnx.load_model(path, load_external_data=False).graph.node)
        turned.append(replace(part, graph_bytes=path.stat().st_size, nodes=nodes))
    return Float16Graphs(tuple(turned), kept, difference)


def _outputs(path: Path, feeds: Sequence[Feed]) -> list[dict[str, NDArray[np.float32]]]:
    """What the graph gives on each feed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # Weights in float32 for the whole run would take twice the memory.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    found = []
    for feed in feeds:
        outputs = session.run(names, typed(session, feed))
        found.append({n: np.asarray(a, np.float32) for n, a in zip(names, outputs, strict=True)})
    return found


def _require_finite(path: Path, feeds: Sequence[Feed]) -> None:
    # Values are looked at one by one: between two operators onnxruntime's CPU provider keeps float32,
    # so that outputs alone would hide an overflow.
    wide = beyond_float16(path, feeds, kind=TensorProto.FLOAT16)
    if wide:
        raise ParityFailed(
            f"{path}: node '{wide[0].node}' leaves float16 although its values did not in float32; "
            "export with --compute float32"
        )


def _difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / largest if largest else 0.0
