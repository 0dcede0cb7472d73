"""A ResNet as an ONNX graph; onnxruntime folds each batch norm into the convolution before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from exporter.families.specs.densenet import NORM_EPS
from exporter.families.specs.resnet import Bottleneck, ResNetImage
from exporter.graphs.linear import float_weight, linear
from exporter.graphs.weights import WeightSource
from exporter.graphs.writer import GraphWriter, WrittenGraph


def write_resnet_image(
    folder: Path, name: str, spec: ResNetImage, weights: WeightSource, accuracy_level: int
) -> WrittenGraph:
    """Write ``<name>.onnx``.

    pixel_values float32 [images, 3, image_size, image_size] -> image_embeds float32
    [images, output_size], not normalised. Raises `InputRefused` when tensors are missing or of other
    shapes.
    """
    with GraphWriter(folder, name) as writer:
        side = spec.image_size
        pixels = writer.input("pixel_values", TensorProto.FLOAT, ["images", 3, side, side])
        embeds = writer.output("image_embeds", TensorProto.FLOAT, ["images", spec.output_size])
        pooled = _ResNet(writer, spec, weights).pooled(pixels)
        at = f"{spec.prefix}fc"
        matrix = weights.matrix(f"{at}.weight", spec.output_size, spec.channels)
        product = linear(
            writer, at, pooled, matrix, accuracy_level, output=None if spec.bias else embeds
        )
        if spec.bias:
            bias = writer.weight(f"{at}.bias", weights.vector(f"{at}.bias", spec.output_size))
            writer.node("Add", f"{at}/bias", [product, bias], outputs=[embeds])
        return writer.finish()


class _ResNet:
    """Values are float32 ``[images, channels, height, width]``."""

    def __init__(self, writer: GraphWriter, spec: ResNetImage, weights: WeightSource) -> None:
        self.writer = writer
        self.spec = spec
        self.weights = weights

    def pooled(self, pixels: str) -> str:
        """Mean of the last block's cells, ``[images, channels]``."""
        at, writer = self.spec.prefix, self.writer
        shape = (self.spec.first, 3, 7, 7)
        x = self._relu(f"{at}relu", self._convolved(f"{at}conv1", f"{at}bn1", pixels, shape, 2))
        pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        x = writer.node("MaxPool", f"{at}maxpool", [x], attributes=pool)
        for block in self.spec.blocks():
            x = self._block(block, x)
        axes = writer.constant("cells", np.array([2, 3], np.int64))
        return writer.node("ReduceMean", f"{at}avgpool", [x, axes], attributes={"keepdims": 0})

    def _block(self, block: Bottleneck, x: str) -> str:
        parts = list(block.convolutions())
        # torchvision strides in the 3 x 3 convolution.
        found = x
        for (name, norm, shape), stride in zip(parts[:3], (1, block.stride, 1), strict=True):
            found = self._convolved(name, norm, found, shape, stride)
            if shape is not parts[2][2]:
                found = self._relu(f"{name}.relu", found)
        for name, norm, shape in parts[3:]:
            x = self._convolved(name, norm, x, shape, block.stride)
        added = self.writer.node("Add", f"{block.name}add", [found, x])
        return self._relu(f"{block.name}relu", added)

    def _convolved(
        self, name: str, norm: str, x: str, shape: tuple[int, int, int, int], stride: int
    ) -> str:
        """The convolution `name` and the norm behind it."""
        kernel = self.weights.array(f"{name}.weight", shape)
        side = shape[-1]
        attributes = {
            "kernel_shape": [side, side],
            "strides": [stride, stride],
            "pads": [side // 2] * 4,
        }
        stored = float_weight(self.writer, f"{name}.weight", kernel)
        made = self.writer.node("Conv", name, [x, stored], attributes=attributes)
        vectors = [
            self.writer.weight(f"{norm}.{part}", self.weights.vector(f"{norm}.{part}", shape[0]))
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        epsilon = {"epsilon": NORM_EPS}
        return self.writer.node("BatchNormalization", norm, [made, *vectors], attributes=epsilon)

    def _relu(self, name: str, x: str) -> str:
        return self.writer.node("Relu", name, [x])
