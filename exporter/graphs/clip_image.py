"""The image half of CLIP as an ONNX graph of onnxruntime's fused ops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.clip import ClipImage
from exporter.graphs.clip_tower import clip_states
from exporter.graphs.layers import Stream
from exporter.graphs.vit import Vit
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_clip_image(
    folder: Path, name: str, spec: ClipImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> image_embeds float32
    [images, output_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    side = spec.tower.image_size
    with GraphWriter(folder, name) as writer:
        vit = Vit(writer, spec.tower, weights, accuracy_level)
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", 3, side, side])
        embeds = writer.output("image_embeds", TensorProto.FLOAT, ["images", spec.output_size])
        first = writer.constant("class_token.row", np.array([0], np.int64))
        states = clip_states(vit, spec.tower, pixels)
        row = writer.node("Gather", "class_row", [states, first], attributes={"axis": 1})
        summary = vit.reshape("summary", row, [-1, spec.tower.hidden_size])
        normed, _ = vit.norm(f"{spec.tower.prefix}post_layernorm", Stream(summary), last=True)
        matrix = weights.matrix(spec.projection, spec.output_size, spec.tower.hidden_size)
        vit.multiply("projection", normed, matrix, output=embeds)
        return writer.finish()
