"""Shapes of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    EncoderShape,
    ModelShape,
    Weights,
    gated_mlp,
    linear,
    llama_decoder,
    norm,
    other,
    plain_blocks,
)
from exporter.families.shapes.read import (
    decoder_shape,
)


def qwen2_vl(facts: ConfigFacts) -> ModelShape:
    """Qwen2-VL: any resolution, layer norms, full attention over all patches of the image."""
    hidden = facts.size("vision_config.embed_dim")
    inner = hidden * facts.size("vision_config.mlp_ratio", default=4)
    depth, patches, merge = _qwen_grid(facts)
    blocks = plain_blocks("vision", depth, hidden, inner, patches)
    tower = _any_resolution(facts, hidden, inner, (patches,) * depth, patches)
    return _qwen(facts, tower, (*blocks, *norm("vision", hidden)), merge)


def qwen2_5_vl(facts: ConfigFacts) -> ModelShape:
    """Qwen2.5-VL: RMS norms, gated MLP, windows of `window_size` pixels in all but a few layers."""
    hidden = facts.size("vision_config.hidden_size")
    inner = facts.size("vision_config.intermediate_size")
    depth, patches, merge = _qwen_grid(facts)
    window = facts.size("vision_config.window_size") // facts.size("vision_config.patch_size")
    full = facts.sizes("vision_config.fullatt_block_indexes")
    attended = tuple(patches if i in full else min(patches, window**2) for i in range(depth))
    blocks = (
        *linear("vision", hidden, hidden, count=4 * depth, bias=True, rows_in=patches),
        *gated_mlp("vision", depth, hidden, inner, bias=True, rows_in=patches),
        *norm("vision", hidden, count=2 * depth + 1, bias=False),
    )
    return _qwen(facts, _any_resolution(facts, hidden, inner, attended, patches), blocks, merge)


def _qwen_grid(facts: ConfigFacts) -> tuple[int, int, int]:
    """Layers of the tower, patches of an image at the pixel limit, patches merged into one row."""
    patch = facts.size("vision_config.patch_size")
    merge = facts.size("vision_config.spatial_merge_size") ** 2
    limit = facts.limit("max_pixels", 1280 * merge * patch**2)
    pixels = min(limit, facts.max_pixels or limit)
    return facts.size("vision_config.depth"), pixels // (merge * patch**2) * merge, merge


def _any_resolution(
    facts: ConfigFacts, hidden: int, inner: int, attended: tuple[int, ...], patches: int
) -> EncoderShape:
    patch = facts.size("vision_config.patch_size")
    heads = facts.size("vision_config.num_heads")
    return EncoderShape(hidden, inner, heads, patches, attended, pixels=patches * patch**2)


def _qwen(
    facts: ConfigFacts, tower: EncoderShape, blocks: tuple[Weights, ...], merge: int
) -> ModelShape:
    rows, wide = tower.sequence // merge, tower.hidden * merge
    d = decoder_shape(facts, image_tokens=rows + 2)
    frames = facts.size("vision_config.temporal_patch_size")
    patch = facts.size("vision_config.patch_size")
    weights = (
        *other("vision", tower.hidden, 3 * frames * patch**2),
        *blocks,
        *linear("vision", wide, wide, bias=True, rows_in=rows),
        *linear("vision", d.hidden, wide, bias=True, rows_in=rows),
        *llama_decoder(d, qkv_bias=True),
    )
    return ModelShape("captioner", weights, tower, decoder=d)
