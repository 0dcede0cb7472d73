"""Shapes of Gemma 3 with its image part."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    ModelShape,
    linear,
    llama_decoder,
    norm,
    plain_blocks,
)
from exporter.families.shapes.read import decoder_shape, patch_embedding, tower_shape

# Around the feature rows of an image: begin, end, and two newlines (one token) before and behind.
MARKERS = 4


def gemma3(facts: ConfigFacts) -> ModelShape:
    """Gemma 3: one view of an image, its patches averaged to a fixed number of rows."""
    v = "vision_config."
    side, patch = facts.size(v + "image_size"), facts.size(v + "patch_size")
    sequence, tokens = (side // patch) ** 2, facts.size("mm_tokens_per_image")
    tower = tower_shape(facts, v, sequence=sequence, tiles=1, side=side)
    d = decoder_shape(facts, image_tokens=tokens + MARKERS, quadratic=True)
    weights = (
        *patch_embedding(tower.hidden, patch, sequence, class_token=False, bias=True),
        *plain_blocks("vision", len(tower.attended), tower.hidden, tower.inner, sequence),
        *norm("vision", tower.hidden),
        *norm("vision", tower.hidden, bias=False),
        *linear("vision", d.hidden, tower.hidden, rows_in=tokens),
        *llama_decoder(d),
        # Two further norms a layer, and those of queries and keys.
        *norm("decoder", d.hidden, count=2 * d.layers, bias=False),
        *norm("decoder", d.head_dim, count=2 * d.layers, bias=False),
    )
    return ModelShape("captioner", weights, tower, decoder=d)
