"""Shapes of Gemma 3 with its image part."""

from __future__ import annotations

from dataclasses import replace

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    ModelShape,
    linear,
    llama_decoder,
    norm,
    plain_blocks,
)
from exporter.families.shapes.read import decoder_shape, patch_embedding, tower_shape
from exporter.families.specs.gemma3 import PATTERN, SLIDING, TEXT_SIZES

# Around the feature rows of an image: begin, end, and two newlines (one token) before and behind.
MARKERS = 4


def gemma3(facts: ConfigFacts) -> ModelShape:
    """Gemma 3: one view of an image, its patches averaged to a fixed number of rows."""
    v = "vision_config."
    side, patch = facts.size(v + "image_size"), facts.size(v + "patch_size")
    sequence, tokens = (side // patch) ** 2, facts.size("mm_tokens_per_image")
    tower = tower_shape(facts, v, sequence=sequence, tiles=1, side=side)
    d = decoder_shape(facts, image_tokens=tokens + MARKERS, quadratic=True)
    d = replace(d, windows=_windows(facts, d.layers))
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


def _windows(facts: ConfigFacts, layers: int) -> tuple[int, ...]:
    """The window of each layer that has one: the listed ones, or all but every n-th."""
    t = "text_config."
    window = facts.size(t + "sliding_window", default=TEXT_SIZES["sliding_window"])
    kinds = facts.values.get(t + "layer_types")
    if isinstance(kinds, tuple):
        return (window,) * kinds.count(SLIDING)
    names = (t + "sliding_window_pattern", t + "_sliding_window_pattern")
    return (window,) * (layers - layers // facts.size(*names, default=PATTERN))
