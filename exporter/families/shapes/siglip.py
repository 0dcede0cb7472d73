"""Shapes of SigLIP models."""

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


def siglip(facts: ConfigFacts) -> ModelShape:
    """SigLIP: a tower without class token, attention pooling, a text encoder; scale and bias."""
    tower, vision = _image(facts)
    text, words = _text(facts)
    return ModelShape("matcher", (*vision, *words, *other("text", 2)), tower, text)


def _image(facts: ConfigFacts) -> tuple[EncoderShape, tuple[Weights, ...]]:
    v = "vision_config."
    side, patch = facts.size(v + "image_size"), facts.size(v + "patch_size")
    hidden, inner = facts.size(v + "hidden_size"), facts.size(v + "intermediate_size")
    layers, heads = facts.size(v + "num_hidden_layers"), facts.size(v + "num_attention_heads")
    rows = (side // patch) ** 2
    tower = EncoderShape(hidden, inner, heads, rows, (rows,) * layers, side=side)
    return tower, (
        *other("vision", hidden, 3 * patch**2 + 1),
        *other("vision", rows, hidden),
        *plain_blocks("vision", layers, hidden, inner, rows),
        *norm("vision", hidden, count=2),
        *other("vision", hidden),
        # Keys and values of all rows; the query's third is the same for all images.
        *linear("vision", 3 * hidden, hidden, bias=True, rows_in=rows),
        *linear("vision", hidden, hidden, bias=True),
        *linear("vision", inner, hidden, bias=True),
        *linear("vision", hidden, inner, bias=True),
    )


def _text(facts: ConfigFacts) -> tuple[EncoderShape, tuple[Weights, ...]]:
    t = "text_config."
    hidden, inner = facts.size(t + "hidden_size"), facts.size(t + "intermediate_size")
    layers, heads = facts.size(t + "num_hidden_layers"), facts.size(t + "num_attention_heads")
    positions = facts.size(t + "max_position_embeddings")
    size = facts.size(t + "projection_size", default=hidden)
    text = EncoderShape(hidden, inner, heads, positions, (positions,) * layers)
    return text, (
        Weights("text", "embedding", facts.size(t + "vocab_size"), hidden),
        *other("text", positions, hidden),
        *plain_blocks("text", layers, hidden, inner, positions),
        *norm("text", hidden),
        *linear("text", size, hidden, bias=True),
    )
