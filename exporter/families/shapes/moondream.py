"""Shape of Moondream2."""

from __future__ import annotations

from dataclasses import replace

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    ModelShape,
    embedding,
    linear,
    norm,
    plain_blocks,
)
from exporter.families.shapes.read import (
    biased_decoder,
    decoder_shape,
    patch_embedding,
    tower_shape,
)


def moondream(facts: ConfigFacts) -> ModelShape:
    """Moondream2: SigLIP crops merged to one grid, Phi-1.5 whose prefix attention runs both ways."""
    side, patch = facts.size("vision_config.image_size"), facts.size("vision_config.patch_size")
    hidden, rows = facts.size("vision_config.hidden_size"), (side // patch) ** 2
    tiles = facts.size("vision_config.max_crops", default=12) + 1
    tower = tower_shape(facts, "vision_config.", sequence=rows, tiles=tiles, side=side)
    tower = replace(tower, together=tiles)
    d = decoder_shape(facts, image_tokens=rows, quadratic=True)
    middle = facts.size("vision_config.projection_inner_size")
    weights = (
        *patch_embedding(hidden, patch, rows, class_token=False, bias=True),
        *plain_blocks("vision", len(tower.attended), hidden, tower.inner, rows),
        *norm("vision", hidden),
        # One projection of the joined grid, not one for each crop.
        *linear("vision", middle, 2 * hidden, bias=True, rows_in=-(-rows // tiles)),
        *linear("vision", d.hidden, middle, bias=True, rows_in=-(-rows // tiles)),
        *embedding(d, head_bias=True),
        *biased_decoder(d),
        # Attention and MLP share one norm a block.
        *norm("decoder", d.hidden, count=d.layers + 1),
    )
    return ModelShape("captioner", weights, tower, decoder=d)
