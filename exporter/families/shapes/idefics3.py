"""Shape of Idefics3 and SmolVLM."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    ModelShape,
    linear,
    llama_decoder,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.read import (
    decoder_shape,
    tower_shape,
)


def idefics3(facts: ConfigFacts) -> ModelShape:
    """Idefics3, SmolVLM: SigLIP tiles, pixel shuffle, Llama. A large image is cut into squares and
    shown once more as a whole.
    """
    side = facts.size("vision_config.image_size")
    patch = facts.size("vision_config.patch_size")
    shuffle, hidden = facts.size("scale_factor"), facts.size("vision_config.hidden_size")
    grid = -(-facts.limit("longest_edge", 4 * side) // facts.limit("tile", side))
    tiles = grid**2 + 1 if grid > 1 else 1
    tower = tower_shape(
        facts, "vision_config.", sequence=(side // patch) ** 2, tiles=tiles, side=side
    )
    rows = (side // patch // shuffle) ** 2
    # Two markers a tile, a line break a row of tiles, and three around the whole image.
    markers = 2 * (tiles - 1) + grid + 3 if grid > 1 else 3
    d = decoder_shape(facts, image_tokens=tiles * rows + markers)
    weights = (
        *other("vision", hidden, 3 * patch**2),
        *other("vision", hidden),
        *other("vision", tower.sequence, hidden),
        *plain_blocks("vision", len(tower.attended), hidden, tower.inner, tower.sequence),
        *norm("vision", hidden),
        *linear("vision", d.hidden, hidden * shuffle**2, rows_in=rows),
        *llama_decoder(d),
    )
    return ModelShape("captioner", weights, tower, decoder=d)
