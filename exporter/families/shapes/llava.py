"""Shapes of LLaVA-1.5, LLaVA v1.6 and LLaVA-Med."""

from __future__ import annotations

from dataclasses import replace

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    EncoderShape,
    ModelShape,
    Weights,
    linear,
    llama_decoder,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.read import (
    decoder_shape,
    patch_embedding,
    tower_shape,
)


def llava(facts: ConfigFacts) -> ModelShape:
    """LLaVA-1.5: one view, class token dropped."""
    tower, weights = _clip_tower(facts, tiles=1)
    return _llava(facts, tower, weights, image_tokens=tower.sequence - 1)


def llava_next(facts: ConfigFacts) -> ModelShape:
    """LLaVA v1.6: the whole image and the tiles of the best grid, a newline vector after each row."""
    side = facts.size("vision_config.image_size")
    patches = side // facts.size("vision_config.patch_size")
    grids = [
        (height // side, width // side) for height, width in facts.pairs("image_grid_pinpoints")
    ] or [(2, 2)]
    # Without padding to take away; an image of another shape than its grid gives fewer.
    widest = max(rows * patches * (columns * patches + 1) for rows, columns in grids)
    tiles = 1 + max(rows * columns for rows, columns in grids)
    tower, weights = _clip_tower(facts, tiles=tiles)
    tower = replace(tower, together=tiles)
    newline = other("vision", facts.size("text_config.hidden_size"))
    return _llava(facts, tower, (*weights, *newline), image_tokens=patches**2 + widest)


def _llava(
    facts: ConfigFacts, tower: EncoderShape, weights: tuple[Weights, ...], *, image_tokens: int
) -> ModelShape:
    d = decoder_shape(facts, image_tokens=image_tokens)
    rows = tower.sequence - 1
    projector = (
        *linear("vision", d.hidden, tower.hidden, bias=True, rows_in=rows),
        *linear("vision", d.hidden, d.hidden, bias=True, rows_in=rows),
    )
    return ModelShape("captioner", (*weights, *projector, *llama_decoder(d)), tower, decoder=d)


def _clip_tower(facts: ConfigFacts, tiles: int) -> tuple[EncoderShape, tuple[Weights, ...]]:
    side, patch = facts.size("vision_config.image_size"), facts.size("vision_config.patch_size")
    sequence = (side // patch) ** 2 + 1
    tower = tower_shape(facts, "vision_config.", sequence=sequence, tiles=tiles, side=side)
    weights = (
        *patch_embedding(tower.hidden, patch, sequence, class_token=True),
        *norm("vision", tower.hidden, count=2),
        *plain_blocks("vision", len(tower.attended), tower.hidden, tower.inner, sequence),
    )
    return tower, weights
