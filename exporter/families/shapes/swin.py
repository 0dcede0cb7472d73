"""Shape of MedCLIP: a Swin tower or ResNet-50, and BERT, each with one projection."""

from __future__ import annotations

from exporter.families.layouts.medclip import RESNET
from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    EncoderShape,
    ModelShape,
    Weights,
    linear,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.resnet import resnet
from exporter.families.shapes.text import bert_text

# SwinConfig's.
DEPTHS, HEADS = (2, 2, 6, 2), (3, 6, 12, 24)


def medclip(facts: ConfigFacts) -> ModelShape:
    """MedCLIP with either tower; the projections have no bias, and a ResNet's is its last layer."""
    width = facts.size("projection_dim")
    if facts.values.get("vision_config.model_type") == RESNET:
        tower, vision = resnet(facts, outputs=width, bias=False)
    else:
        tower, vision = _swin(facts, width)
    text, words = bert_text(facts, "text_config.", pooler=False)
    weights = (
        *vision,
        *words,
        *linear("text", width, text.hidden),
        *other("text", 1),
    )
    return ModelShape("matcher", weights, tower, text)


def _swin(facts: ConfigFacts, outputs: int) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """Stages of doubling width on grids of a quarter of the cells each, and a projection.

    The shape has one width and one grid, the first stage's. What a stage's attention costs falls by
    half from stage to stage: so do the positions that one sees here.
    """
    side, patch = facts.size("vision_config.image_size"), facts.size("vision_config.patch_size")
    embed, window = facts.size("vision_config.embed_dim"), facts.size("vision_config.window_size")
    depths = facts.counts("vision_config.depths", DEPTHS)
    heads = facts.counts("vision_config.num_heads", HEADS)
    cells, table = (side // patch) ** 2, (2 * window - 1) ** 2
    weights: list[Weights] = [*other("vision", embed, 3 * patch**2 + 1), *norm("vision", embed)]
    attended: list[int] = []
    for i, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        hidden, rows = embed << i, cells >> 2 * i
        inner = 4 * hidden
        weights += plain_blocks("vision", depth, hidden, inner, rows)
        weights += other("vision", table, count, count=depth)
        if i < len(depths) - 1:
            weights += norm("vision", 4 * hidden)
            weights += linear("vision", 2 * hidden, 4 * hidden, rows_in=rows // 4)
        attended += [max(1, window**2 >> i)] * depth
    last = embed << (len(depths) - 1)
    weights += norm("vision", last)
    weights += linear("vision", outputs, last)
    tower = EncoderShape(embed, 4 * embed, heads[0], cells, tuple(attended), side=side)
    return tower, tuple(weights)
