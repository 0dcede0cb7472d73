"""Shapes of ResNets with bottlenecks, and of MedFILIP, whose image half is one."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    EncoderShape,
    ModelShape,
    Weights,
    batch_norm,
    convolution,
    linear,
    other,
)
from exporter.families.shapes.text import clip_text
from exporter.families.specs.resnet import EXPANSION, RESNET_50, ResNetImage


def medfilip(facts: ConfigFacts) -> ModelShape:
    """MedFILIP: a ResNet whose last layer is its projection, CLIP's text transformer, one scale."""
    width = facts.size("projection_dim")
    tower, vision = resnet(facts, outputs=width, bias=True)
    text, words = clip_text(facts)
    weights = (*vision, *words, *linear("text", width, text.hidden), *other("text", 1))
    return ModelShape("matcher", weights, tower, text)


def resnet(
    facts: ConfigFacts, *, outputs: int, bias: bool
) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """The ResNet of vision_config, absent sizes those of ResNet-50, with a last layer of `outputs`."""
    v = "vision_config."
    depths = facts.counts(v + "depths", RESNET_50)
    first, side = facts.size(v + "embedding_size", default=64), facts.size(v + "image_size")
    spec = ResNetImage(side, depths, first, outputs, bias, prefix="")
    stem = halved(side)
    edge = halved(stem)
    weights = [*convolution(first, 3, 7, stem**2), *batch_norm(first)]
    maps = first * (stem**2 + edge**2)
    for block in spec.blocks():
        before, edge = edge, halved(edge) if block.stride > 1 else edge
        # The second convolution strides, and so does the detour.
        places = (before**2, *[edge**2] * 3)
        for (_, _, (rows, columns, kernel, _)), n in zip(
            block.convolutions(), places, strict=False
        ):
            weights += (*convolution(rows, columns, kernel, n), *batch_norm(rows))
        inside = block.width * (before**2 + edge**2)
        taken, given = block.inputs * before**2, block.outputs * edge**2
        maps = max(maps, bottleneck_maps(taken, inside, given, projected=block.projected))
    weights += linear("vision", outputs, spec.channels, bias=bias)
    tower = EncoderShape(spec.channels, 0, 1, edge**2, (), side=side, maps=maps)
    return tower, tuple(weights)


def halved(edge: int) -> int:
    """Places along an edge behind a stride of 2 with padding."""
    return -(-edge // 2)


def bottleneck_maps(inputs: int, inside: int, outputs: int, *, projected: bool) -> int:
    """Values that live together in a block: its input beside what is `inside` around the middle
    convolution, or beside its output and the shortcut's, or the narrow map that the output is made of.
    """
    return inputs + max(inside, outputs + (outputs if projected else outputs // EXPANSION))
