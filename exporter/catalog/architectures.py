"""One pure function for each kind of architecture: published sizes to a `ModelShape`.

Counts are exact: tests hold them against published parameter counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from exporter.catalog.config_facts import ConfigFacts
from exporter.catalog.shape_cross import blip2, idefics, vision_encoder_decoder
from exporter.catalog.shape_parts import (
    EncoderShape,
    ModelShape,
    Weights,
    embedding,
    gated_mlp,
    linear,
    llama_decoder,
    norm,
    other,
    plain_blocks,
)
from exporter.catalog.shape_plugin import medbridge
from exporter.catalog.shape_read import (
    biased_decoder,
    decoder_shape,
    patch_embedding,
    tower_shape,
)
from exporter.catalog.shape_swin import medclip
from exporter.catalog.shape_text import (
    bert,
    biomedclipseg,
    clip,
    clipseg,
    distilbert,
    open_clip,
    t5,
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


SHAPES: dict[str, Callable[[ConfigFacts], ModelShape]] = {
    "idefics3": idefics3,
    "smolvlm": idefics3,
    "llava": llava,
    "llava_mistral": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "idefics": idefics,
    "moondream1": moondream,
    "moondream2": moondream,
    "vision-encoder-decoder": vision_encoder_decoder,
    "blip-2": blip2,
    "mini_gpt4": blip2,
    "clip": clip,
    "chexzero": clip,
    "medbridge": medbridge,
    "biomedclip": open_clip,
    "medclip": medclip,
    "clipseg": clipseg,
    "biomedclipseg": biomedclipseg,
    "bert": bert,
    "distilbert": distilbert,
    "t5": t5,
}
