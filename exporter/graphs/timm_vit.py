"""timm's vision transformer with its projection as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.timm_vit import TimmImage
from exporter.graphs.layers import Stream
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_timm_image(
    folder: Path, name: str, spec: TimmImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> image_embeds float32
    [images, output_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    tower, side = spec.tower, spec.tower.image_size
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", 3, side, side])
        embeds = writer.output("image_embeds", TensorProto.FLOAT, ["images", spec.output_size])
        at = tower.prefix
        stream = Stream(vit.class_token_and_patches(f"{at}cls_token", f"{at}pos_embed", pixels))
        for layer in range(tower.layers):
            stream = vit.block(layer, stream)
        rows, _ = vit.norm(f"{tower.prefix}norm", stream, last=True)
        matrix = weights.matrix(spec.projection, spec.output_size, tower.hidden_size)
        vit.multiply("projection", _first_row(writer, rows), matrix, output=embeds)
        return writer.finish()


def _first_row(writer: GraphWriter, rows: str) -> str:
    """The class token's row of each image."""
    bounds = [
        writer.constant(f"class_row.{name}", np.array([value], np.int64))
        for name, value in (("start", 0), ("end", 1), ("axis", 1))
    ]
    kept = writer.node("Slice", "class_rows", [rows, *bounds])
    return writer.node("Squeeze", "class_row", [kept, bounds[2]])
