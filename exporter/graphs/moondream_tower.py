"""Moondream's vision part as an ONNX graph: tower, joined grid of crops, projection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.moondream_vision import MoondreamVision
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.layers import Stream
from exporter.graphs.linear import float_weight
from exporter.graphs.tower import NAME
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def write_moondream_vision(
    folder: Path,
    spec: MoondreamVision,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``, one image a run.

    pixel_values float32 [1, crops, 3, image_size, image_size], the whole image first; stitch_index
    int64 [height, width]: which row of all crops' rows stands where in their joined grid; row_shares
    float32 [patches, height] and column_shares [patches, width]: how the grid is averaged to the size
    of one crop's (see `families.images.overlap_crops`) -> image_features float32 [1, tokens, output_size].
    Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        vit = Vit(writer, spec, weights, accuracy_level)
        side = spec.image_size
        pixels = writer.input("pixel_values", FLOAT, ["batch_size", "crops", 3, side, side])
        stream = Stream(_embedded(vit, spec, pixels))
        for layer in range(spec.layers):
            stream = vit.block(layer, stream)
        rows, _ = vit.norm(f"{spec.prefix}post_ln", stream, last=True)
        _projected(vit, spec, _joined(vit, spec, rows))
        return writer.finish()


def _embedded(vit: Vit, spec: MoondreamVision, pixels: str) -> str:
    rows = vit.patches(pixels, bias=True)
    table = vit.weights.array(f"{spec.prefix}pos_emb", (1, spec.tokens, spec.hidden_size))
    placed = float_weight(vit.writer, "positions", table)
    return vit.writer.node("Add", "embedded", [rows, placed])


def _joined(vit: Vit, spec: MoondreamVision, rows: str) -> str:
    """Each place's row of the whole image, and beside it the average of the crops' rows there."""
    writer, hidden, side = vit.writer, spec.hidden_size, spec.patches
    index = writer.input("stitch_index", INT64, ["height", "width"])
    shares = [
        writer.input(f"{axis}_shares", FLOAT, [side, length])
        for axis, length in (("row", "height"), ("column", "width"))
    ]
    flat = vit.reshape("flat", rows, [-1, hidden])
    grid = writer.node("Gather", "grid", [flat, index])
    length = writer.node("Shape", "grid_height", [index], attributes={"start": 0, "end": 1})
    rest = writer.constant("grid_rest", np.array([-1], np.int64))
    lines = writer.node("Concat", "lines.shape", [length, rest], attributes={"axis": 0})
    lined = writer.node("Reshape", "lines", [grid, lines])
    summed = writer.node("MatMul", "row_averages", [shares[0], lined])
    columns = vit.reshape("columns", summed, [side, -1, hidden])
    pooled = writer.node("MatMul", "averages", [shares[1], columns])
    local = vit.reshape("local", pooled, [1, spec.tokens, hidden])
    bounds = [np.array([v], np.int64) for v in (0, 1)]
    first, one = (writer.constant(f"whole.{i}", v) for i, v in enumerate(bounds))
    whole = writer.node("Slice", "whole", [rows, first, one, first])
    return writer.node("Concat", "joined", [whole, local], attributes={"axis": -1})


def _projected(vit: Vit, spec: MoondreamVision, x: str) -> None:
    """The two-layer projection to the width of the decoder."""
    at = f"{spec.prefix}proj_mlp."
    output = vit.writer.output("image_features", FLOAT, [1, spec.tokens, spec.output_size])
    wide, bias = vit.product(
        "projection.fc1", f"{at}fc1", x, (spec.inner_size, 2 * spec.hidden_size)
    )
    active = vit.activate("projection.gelu", spec.activation, wide, bias)
    product = vit.product("projection.fc2", f"{at}fc2", active, (spec.output_size, spec.inner_size))
    vit.writer.node("Add", "projected", list(product), outputs=[output])
