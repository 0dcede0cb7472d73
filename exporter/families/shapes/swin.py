"""Shape of MedCLIP: a Swin tower and BERT, each with one projection."""

from __future__ import annotations

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
from exporter.families.shapes.text import bert_text


def medclip(facts: ConfigFacts) -> ModelShape:
    """MedCLIP with its Swin tower; the projections have no bias."""
    tower, vision = _swin(facts)
    text, words = bert_text(facts, "text_config.", pooler=False)
    width = facts.size("projection_dim")
    last = tower.hidden << (len(facts.sizes("vision_config.depths")) - 1)
    weights = (
        *vision,
        *linear("vision", width, last),
        *words,
        *linear("text", width, text.hidden),
        *other("text", 1),
    )
    return ModelShape("matcher", weights, tower, text)


def _swin(facts: ConfigFacts) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """Stages of doubling width on grids of a quarter of the cells each.

    The shape has one width and one grid, the first stage's. What a stage's attention costs falls by
    half from stage to stage: so do the positions that one sees here.
    """
    side, patch = facts.size("vision_config.image_size"), facts.size("vision_config.patch_size")
    embed, window = facts.size("vision_config.embed_dim"), facts.size("vision_config.window_size")
    depths = facts.sizes("vision_config.depths")
    heads = facts.sizes("vision_config.num_heads")
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
    weights += norm("vision", embed << (len(depths) - 1))
    tower = EncoderShape(embed, 4 * embed, heads[0], cells, tuple(attended), side=side)
    return tower, tuple(weights)
