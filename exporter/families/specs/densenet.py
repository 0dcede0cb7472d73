"""DenseNet (arXiv 1608.06993) as torchvision names it: its layers in order, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from exporter.families.base import TensorSpec
from exporter.families.specs.layers import batch_norm_tensors, convolution_tensor

# torchvision's modules all have this epsilon.
NORM_EPS = 1e-5


@dataclass(frozen=True)
class DenseLayer:
    """One layer of a block: two norms and convolutions, whose output joins its input.

    `name` has its dot; `inputs` are the channels that it gets.
    """

    name: str
    inputs: int


@dataclass(frozen=True)
class DenseBlock:
    """Layers, then a transition (whole name with its dot, empty behind the last block) that halves the
    `outputs` channels and the edges.
    """

    layers: tuple[DenseLayer, ...]
    outputs: int
    transition: str


@dataclass(frozen=True)
class DenseNetSpec:
    """Sizes in channels; `prefix` is put before ``conv0``, ``denseblock1`` and their siblings.

    The first convolution and a pool take a quarter of the image's edges, each transition half.
    """

    growth: int
    blocks: tuple[int, ...]
    first: int
    bottleneck: int
    prefix: str

    def dense_blocks(self) -> Iterator[DenseBlock]:
        """The blocks in order."""
        channels = self.first
        for number, count in enumerate(self.blocks, 1):
            layers = tuple(
                DenseLayer(
                    f"{self.prefix}denseblock{number}.denselayer{i + 1}.",
                    channels + i * self.growth,
                )
                for i in range(count)
            )
            channels += count * self.growth
            last = number == len(self.blocks)
            yield DenseBlock(layers, channels, "" if last else f"{self.prefix}transition{number}.")
            channels = channels if last else channels // 2

    @property
    def channels(self) -> int:
        """Channels of the last block: the width of a cell's row."""
        return list(self.dense_blocks())[-1].outputs

    def cells(self, side: int) -> int:
        """Cells along each edge of an image of `side` pixels."""
        edge = -(-side // 2)  # conv0: kernel 7, stride 2, padding 3
        edge = -(-edge // 2)  # pool0: kernel 3, stride 2, padding 1
        for _ in self.blocks[1:]:
            edge //= 2
        return edge

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of ``features``; there is no classifier."""
        inner = self.bottleneck * self.growth
        yield convolution_tensor(f"{self.prefix}conv0", self.first, 3, 7)
        yield from batch_norm_tensors(f"{self.prefix}norm0", self.first)
        for block in self.dense_blocks():
            for layer in block.layers:
                yield from batch_norm_tensors(f"{layer.name}norm1", layer.inputs)
                yield convolution_tensor(f"{layer.name}conv1", inner, layer.inputs, 1)
                yield from batch_norm_tensors(f"{layer.name}norm2", inner)
                yield convolution_tensor(f"{layer.name}conv2", self.growth, inner, 3)
            if block.transition:
                yield from batch_norm_tensors(f"{block.transition}norm", block.outputs)
                yield convolution_tensor(
                    f"{block.transition}conv", block.outputs // 2, block.outputs, 1
                )
        yield from batch_norm_tensors(f"{self.prefix}norm5", self.channels)
