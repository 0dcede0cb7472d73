"""The CLIP tower with LLaVA's projector as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.clip_tower import ClipTower
from exporter.families.specs.llava_vision import LlavaVision
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.tower import NAME
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

LAST = np.iinfo(np.int64).max


def write_llava_vision(
    folder: Path,
    spec: LlavaVision,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``.

    pixel_values float32 [batch, tiles, 3, image_size, image_size] -> image_features float32
    [batch * tiles, tokens, output_size]. With a newline also feature_index int64 [rows], and
    image_features are [rows, output_size]: row k is row ``feature_index[k]`` of all tiles' rows,
    the newline standing behind them. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        build_llava_vision(Vit(writer, spec.tower, weights, accuracy_level), spec)
        return writer.finish()


def build_llava_vision(vit: Vit, spec: LlavaVision) -> None:
    """Inputs, outputs and nodes of the graph, in the ops that `vit` has; see `write_llava_vision`."""
    writer = vit.writer
    side = spec.tower.image_size
    pixels = writer.input("pixel_values", TensorProto.FLOAT, ["batch_size", "tiles", 3, side, side])
    hidden = clip_states(vit, spec.tower, pixels)
    if not spec.class_token:
        hidden = _without_class_token(writer, hidden)
    if spec.newline:
        _gathered(vit, spec, _projected(vit, spec, hidden))
    else:
        shape: list[int | str] = ["features", spec.tokens, spec.output_size]
        features = writer.output("image_features", TensorProto.FLOAT, shape)
        _projected(vit, spec, hidden, output=features)


def clip_states(vit: Vit, tower: ClipTower, pixels: str) -> str:
    """Hidden states ``[tiles, 1 + patches, hidden]`` behind the tower's last used block."""
    normed, _ = vit.norm(f"{tower.prefix}pre_layrnorm", Stream(_embedded(vit, tower, pixels)))
    stream = Stream(normed)
    for layer in range(tower.used_layers):
        stream = vit.block(layer, stream)
    return vit.total("states", stream)


def _embedded(vit: Vit, tower: ClipTower, pixels: str) -> str:
    """Patches and, before them, the class token, each with its position."""
    writer, size = vit.writer, tower.hidden_size
    at = f"{tower.prefix}embeddings."
    rows = vit.patches(pixels, bias=False)
    table = vit.weights.array(f"{at}position_embedding.weight", (tower.rows, size))
    positions = float_weight(writer, "positions", table[1:])
    first = vit.weights.vector(f"{at}class_embedding", size) + table[0].astype(np.float32)
    token = writer.weight("class_token", first.reshape(1, 1, size))
    return vit.behind_token(rows, positions, token)


def _without_class_token(writer: GraphWriter, hidden: str) -> str:
    bounds = {"patches.start": 1, "patches.end": LAST, "patches.axis": 1}
    names = [writer.constant(name, np.array([v], np.int64)) for name, v in bounds.items()]
    return writer.node("Slice", "patches", [hidden, *names])


def _projected(vit: Vit, spec: LlavaVision, x: str, output: str | None = None) -> str:
    """The two-layer projector, at the width of the decoder."""
    inner, outer = spec.tower.hidden_size, spec.output_size
    wide, bias = vit.product("projector.linear_1", f"{spec.projector}linear_1", x, (outer, inner))
    active = vit.activate("projector.gelu", spec.projector_activation, wide, bias)
    product = vit.product("projector.linear_2", f"{spec.projector}linear_2", active, (outer, outer))
    return vit.writer.node("Add", "projected", product, outputs=[output] if output else None)


def _gathered(vit: Vit, spec: LlavaVision, rows: str) -> None:
    """The rows that ``feature_index`` names, of all tiles' rows and the newline behind them."""
    writer, size = vit.writer, spec.output_size
    index = writer.input("feature_index", TensorProto.INT64, ["rows"])
    features = writer.output("image_features", TensorProto.FLOAT, ["rows", size])
    flat = vit.reshape("flat", rows, [-1, size])
    newline = vit.weights.vector(spec.newline, size).reshape(1, size)
    line = writer.weight("newline", newline)
    table = writer.node("Concat", "rows_and_newline", [flat, line], attributes={"axis": 0})
    writer.node("Gather", "packed", [table, index], outputs=[features])
