"""A Swin tower with its projection as an ONNX graph of onnxruntime's ops."""

from __future__ import annotations

from pathlib import Path

from onnx import TensorProto

from exporter.families.task_models.medclip import SwinImage
from exporter.graphs.linear import linear
from exporter.graphs.swin import Swin
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_swin_image(
    folder: Path, name: str, spec: SwinImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> image_embeds float32
    [images, output_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    side = spec.tower.image_size
    with GraphWriter(folder, name) as writer:
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", 3, side, side])
        embeds = writer.output("image_embeds", TensorProto.FLOAT, ["images", spec.output_size])
        pooled = Swin(writer, spec.tower, weights, accuracy_level).pooled(pixels)
        matrix = weights.matrix(spec.projection, spec.output_size, spec.tower.output_size)
        linear(writer, "projection", pooled, matrix, accuracy_level, output=embeds)
        return writer.finish()
