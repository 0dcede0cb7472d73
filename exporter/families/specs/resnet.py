"""ResNet with bottlenecks (arXiv 1512.03385, the form of torchvision's resnet50) and its last layer.

Names are torchvision's behind a prefix: ``conv1``, ``layer1.0.conv1`` and their siblings, ``fc``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, Feed, TensorSpec
from exporter.families.config import count
from exporter.families.specs.examples import example_images
from exporter.families.specs.layers import CONVOLUTION, batch_norm_tensors

EXPANSION = 4
RESNET_50 = (3, 4, 6, 3)


@dataclass(frozen=True)
class Bottleneck:
    """Three convolutions with a detour: `name` has its dot; `projected`: the detour has one too."""

    name: str
    inputs: int
    width: int
    stride: int
    projected: bool

    @property
    def outputs(self) -> int:
        """Channels behind the block."""
        return EXPANSION * self.width

    def convolutions(self) -> Iterator[tuple[str, str, tuple[int, int, int, int]]]:
        """Name of each convolution and of the norm behind it, and the kernel's shape."""
        at, width = self.name, self.width
        yield f"{at}conv1", f"{at}bn1", (width, self.inputs, 1, 1)
        yield f"{at}conv2", f"{at}bn2", (width, width, 3, 3)
        yield f"{at}conv3", f"{at}bn3", (self.outputs, width, 1, 1)
        if self.projected:
            shape = (self.outputs, self.inputs, 1, 1)
            yield f"{at}downsample.0", f"{at}downsample.1", shape


@dataclass(frozen=True)
class ResNetImage:
    """A whole ResNet whose last layer gives an image's vector; `bias`: the last layer has one."""

    image_size: int
    depths: tuple[int, ...]
    first: int
    output_size: int
    bias: bool
    prefix: str

    @property
    def channels(self) -> int:
        """Channels behind the last block."""
        return EXPANSION * (self.first << (len(self.depths) - 1))

    def blocks(self) -> Iterator[Bottleneck]:
        """Every block in order: the first of a stage projects its detour, from stage 2 on with stride 2."""
        inputs = self.first
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                name = f"{self.prefix}layer{stage + 1}.{i}."
                block = Bottleneck(name, inputs, self.first << stage, stride, i == 0)
                inputs = block.outputs
                yield block

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the network."""
        yield from _convolution(f"{self.prefix}conv1", f"{self.prefix}bn1", (self.first, 3, 7, 7))
        for block in self.blocks():
            for name, norm, shape in block.convolutions():
                yield from _convolution(name, norm, shape)
        matrix = (self.output_size, self.channels)
        yield TensorSpec(f"{self.prefix}fc.weight", matrix, "vision")
        if self.bias:
            yield TensorSpec(f"{self.prefix}fc.bias", matrix[:1], reason=BIAS)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.image_size, rng)


def resnet_image(
    config: Mapping[str, Any],
    prefix: str,
    *,
    output_size: int,
    bias: bool,
    image_size: int,
    where: str = "vision_config",
) -> ResNetImage:
    """The network of a part of a config.json, absent sizes those of ResNet-50; `image_size` is the
    default of its own key. Raises `InputRefused`.
    """
    depths = RESNET_50 if config.get("depths") is None else config["depths"]
    if (
        not isinstance(depths, list | tuple)
        or not depths
        or not all(type(n) is int and n > 0 for n in depths)
    ):
        raise InputRefused(f"config.json: {where}.depths is {depths!r}; expected positive integers")
    side = count(config, "image_size", image_size, where)
    first = count(config, "embedding_size", 64, where)
    return ResNetImage(side, tuple(depths), first, output_size, bias, prefix)


def _convolution(name: str, norm: str, shape: tuple[int, int, int, int]) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", shape, reason=CONVOLUTION)
    yield from batch_norm_tensors(norm, shape[0])
