"""DenseNet with encoder layers over its cells, and a decoder's cross keys and values, as one ONNX graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.captioners.cnn_transformer import CellVision
from exporter.families.specs.densenet import NORM_EPS, DenseLayer
from exporter.graphs.cross import write_cross_outputs
from exporter.graphs.dialect import OpenDialect
from exporter.graphs.linear import float_weight
from exporter.graphs.post_norm import PostNorm
from exporter.graphs.tower import NAME
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_cell_vision(
    folder: Path,
    spec: CellVision,
    weights: WeightSource,
    accuracy_level: int,
    dialect: OpenDialect | None = None,
) -> WrittenGraph:
    """Write ``vision_encoder.onnx``, with the inputs and outputs of `graphs.cross.write_cross_vit`.

    Raises `InputRefused` when tensors are missing or of other shapes.
    """
    with GraphWriter(folder, NAME, dialect=dialect) as writer:
        side, hidden = spec.image_size, spec.output_size
        shape: list[int | str] = ["batch_size", "tiles", 3, side, side]
        pixels = writer.input("pixel_values", TensorProto.FLOAT, shape)
        cnn = _DenseNet(writer, spec, weights)
        layers = PostNorm(writer, spec.decoder.sizes, weights, accuracy_level)
        cells = cnn.cells(cnn.reshape("images", pixels, [-1, 3, side, side]))
        product = layers.product("project", cells, hidden, spec.cnn.channels)
        projected = writer.node("Add", "project/bias", list(product))
        table = weights.array("cells.weight", (spec.rows, hidden))
        x = writer.node("Add", "placed", [projected, float_weight(writer, "cells.weight", table)])
        for number in range(spec.layers):
            x = layers.encoder_layer(f"encoder.layers.{number}.", x)
        for number in range(spec.decoder.layers):
            name = f"{spec.decoder.layer(number)}multihead_attn."
            both = layers.projected(name, x, 1, 3)
            write_cross_outputs(writer, spec.decoder, spec.rows, number, both)
        return writer.finish()


class _DenseNet:
    """Values are float32 ``[images, channels, height, width]``."""

    def __init__(self, writer: GraphWriter, spec: CellVision, weights: WeightSource) -> None:
        self.writer = writer
        self.spec = spec.cnn
        self.weights = weights

    def cells(self, pixels: str) -> str:
        """The last block's channels at each cell, ``[images, cells, channels]``."""
        spec, at = self.spec, self.spec.prefix
        x = self._convolved(f"{at}conv0", pixels, (spec.first, 3, 7, 7), stride=2)
        x = self._normed(f"{at}norm0", x, spec.first)
        pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        x = self.writer.node("MaxPool", "pool0", [x], attributes=pool)
        for block in spec.dense_blocks():
            for layer in block.layers:
                x = self._layer(layer, x)
            if block.transition:
                name, channels = block.transition, block.outputs
                x = self._normed(f"{name}norm", x, channels)
                x = self._convolved(f"{name}conv", x, (channels // 2, channels, 1, 1))
                halved = {"kernel_shape": [2, 2], "strides": [2, 2]}
                x = self.writer.node("AveragePool", f"{name}pool", [x], attributes=halved)
        x = self._normed(f"{at}norm5", x, spec.channels)
        rows = self.reshape("cell_channels", x, [0, spec.channels, -1])
        return self.writer.node("Transpose", "cell_rows", [rows], attributes={"perm": [0, 2, 1]})

    def reshape(self, name: str, x: str, shape: list[int]) -> str:
        """`x` in another shape; -1 and 0 as in ONNX."""
        target = self.writer.constant(f"{name}.shape", np.array(shape, np.int64))
        return self.writer.node("Reshape", name, [x, target])

    def _layer(self, layer: DenseLayer, x: str) -> str:
        inner, name = self.spec.bottleneck * self.spec.growth, layer.name
        found = self._normed(f"{name}norm1", x, layer.inputs)
        found = self._convolved(f"{name}conv1", found, (inner, layer.inputs, 1, 1))
        found = self._normed(f"{name}norm2", found, inner)
        found = self._convolved(f"{name}conv2", found, (self.spec.growth, inner, 3, 3))
        return self.writer.node("Concat", f"{name}joined", [x, found], attributes={"axis": 1})

    def _convolved(
        self, name: str, x: str, shape: tuple[int, int, int, int], *, stride: int = 1
    ) -> str:
        """The convolution `name` without bias, padded so that only the stride makes edges shorter."""
        kernel = float_weight(
            self.writer, f"{name}.weight", self.weights.array(f"{name}.weight", shape)
        )
        side = shape[-1]
        attributes = {
            "kernel_shape": [side, side],
            "strides": [stride, stride],
            "pads": [side // 2] * 4,
        }
        return self.writer.node("Conv", name, [x, kernel], attributes=attributes)

    def _normed(self, name: str, x: str, channels: int) -> str:
        """ReLU of the batch norm `name`; onnxruntime folds it into a convolution before it."""
        parts = ("weight", "bias", "running_mean", "running_var")
        vectors = [
            self.writer.weight(f"{name}.{p}", self.weights.vector(f"{name}.{p}", channels))
            for p in parts
        ]
        epsilon = {"epsilon": NORM_EPS}
        normed = self.writer.node("BatchNormalization", name, [x, *vectors], attributes=epsilon)
        return self.writer.node("Relu", f"{name}.relu", [normed])
