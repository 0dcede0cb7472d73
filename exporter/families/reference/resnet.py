"""torchvision's resnet50 in torch, for any depths, without torchvision; for the build side."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu

from exporter.families.specs.resnet import Bottleneck, ResNetImage


class _Block(nn.Module):
    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        inputs, width, outputs, stride = block.inputs, block.width, block.outputs, block.stride
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if block.projected:
            kernel = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(kernel, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The three convolutions, added to the detour."""
        found = relu(self.bn1(self.conv1(x)))
        found = relu(self.bn2(self.conv2(found)))
        return relu(self.bn3(self.conv3(found)) + self.downsample(x))


class ResNet(nn.Module):
    """The whole network; its ``fc`` gives an image's vector."""

    def __init__(self, spec: ResNetImage) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, spec.first, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.first)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: dict[str, list[_Block]] = {}
        for block in spec.blocks():
            stage = block.name.removeprefix(spec.prefix).partition(".")[0]
            stages.setdefault(stage, []).append(_Block(block))
        for stage, blocks in stages.items():
            setattr(self, stage, nn.Sequential(*blocks))
        self.stages = tuple(stages)
        self.fc = nn.Linear(spec.channels, spec.output_size, bias=spec.bias)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors ``[images, output_size]``."""
        x = self.maxpool(relu(self.bn1(self.conv1(pixels))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        found: torch.Tensor = self.fc(x.mean((2, 3)))
        return found
