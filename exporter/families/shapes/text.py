"""Shapes of models with a text encoder: CLIP kinds, BERT kinds, T5."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    DecoderShape,
    EncoderShape,
    ModelShape,
    Weights,
    linear,
    norm,
    other,
    plain_blocks,
)


def clip(facts: ConfigFacts) -> ModelShape:
    """CLIP: two towers, two projections without bias, one scale."""
    tower, vision = _clip_vision(facts, facts.size("vision_config.image_size"))
    text, words = clip_text(facts)
    return ModelShape("matcher", (*vision, *words, *_projections(facts, tower, text)), tower, text)


def clipseg(facts: ConfigFacts) -> ModelShape:
    """CLIPSeg: CLIP at the image processor's resolution, three small blocks, three convolutions."""
    tower, vision = _clip_vision(facts, facts.limit("size"))
    text, words = clip_text(facts)
    weights = (*vision, *words, *_projections(facts, tower, text), *_mask_head(facts, tower))
    return ModelShape("segmenter", weights, tower, text)


def biomedclipseg(facts: ConfigFacts) -> ModelShape:
    """BiomedCLIPSeg: CLIPSeg's small blocks and convolutions over BiomedCLIP."""
    matcher = open_clip(facts)
    if matcher.tower is None:
        raise ValueError("open_clip's shape has a tower")
    weights = (*matcher.weights, *_mask_head(facts, matcher.tower))
    return ModelShape("segmenter", weights, matcher.tower, matcher.text)


def _mask_head(facts: ConfigFacts, tower: EncoderShape) -> tuple[Weights, ...]:
    """Three small blocks and three convolutions over states of a tower."""
    small, inner = facts.size("reduce_dim"), facts.size("decoder_intermediate_size")
    taps, condition = len(facts.sizes("extract_layers")), facts.size("projection_dim")
    kernel = (facts.size("vision_config.patch_size") // 4) ** 2
    rows = tower.sequence
    return (
        *linear("vision", small, condition, count=2, bias=True),
        *linear("vision", small, tower.hidden, count=taps, bias=True, rows_in=rows),
        *plain_blocks("vision", taps, small, inner, rows),
        *other("vision", small, small * 9 + 1),
        *other("vision", small // 2, small * kernel + 1),
        *other("vision", 1, small // 2 * kernel + 1),
    )


def open_clip(facts: ConfigFacts) -> ModelShape:
    """BiomedCLIP, MedCLIP: a ViT and BERT, each with one projection."""
    side, patch = facts.size("vision_config.image_size"), facts.size("vision_config.patch_size")
    hidden, inner = (
        facts.size("vision_config.hidden_size"),
        facts.size("vision_config.intermediate_size"),
    )
    layers, sequence = facts.size("vision_config.num_hidden_layers"), (side // patch) ** 2 + 1
    heads = facts.size("vision_config.num_attention_heads")
    tower = EncoderShape(hidden, inner, heads, sequence, (sequence,) * layers, side=side)
    text, words = bert_text(facts, "text_config.", pooler=False)
    width = facts.size("projection_dim")
    # The inner size of BiomedCLIP's text projection: the mean of both widths, rounded down.
    middle = (text.hidden + width) // 2
    weights = (
        *other("vision", hidden, 3 * patch**2 + 2),
        *other("vision", sequence, hidden),
        *plain_blocks("vision", layers, hidden, inner, sequence),
        *norm("vision", hidden),
        *linear("vision", width, hidden),
        *words,
        *linear("text", middle, text.hidden),
        *linear("text", width, middle),
        *other("text", 1),
    )
    return ModelShape("matcher", weights, tower, text)


def bert(facts: ConfigFacts) -> ModelShape:
    """BERT with its pooler, without a task head."""
    text, weights = bert_text(facts, "", pooler=True)
    return ModelShape("encoder", weights, text=text)


def distilbert(facts: ConfigFacts) -> ModelShape:
    """DistilBERT with the masked-word head, whose matrix is the word table."""
    hidden, layers = facts.size("dim"), facts.size("n_layers")
    inner, words = facts.size("hidden_dim"), facts.size("vocab_size")
    positions = facts.size("max_position_embeddings")
    text = EncoderShape(hidden, inner, facts.size("n_heads"), positions, (positions,) * layers)
    weights = (
        Weights("text", "embedding", words, hidden),
        *other("text", positions, hidden),
        *norm("text", hidden, count=2),
        *plain_blocks("text", layers, hidden, inner, positions),
        *linear("text", hidden, hidden, bias=True, rows_in=positions),
        *other("text", words),
    )
    return ModelShape("encoder", weights, text=text)


def t5(facts: ConfigFacts) -> ModelShape:
    """T5 with an ungated MLP: encoder, decoder with cross-attention, one table for all three uses."""
    hidden, inner, heads = facts.size("d_model"), facts.size("d_ff"), facts.size("num_heads")
    layers, below = facts.size("num_decoder_layers"), facts.size("num_layers")
    width, positions = facts.size("d_kv") * heads, facts.size("n_positions")
    text = EncoderShape(hidden, inner, heads, positions, (positions,) * below)
    d = DecoderShape(
        layers=layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=heads,
        head_dim=facts.size("d_kv"),
        vocabulary=facts.size("vocab_size"),
        max_positions=positions,
        image_tokens=0,
        tied=True,
        cross_layers=layers,
        cross_tokens=positions,
        cross_width=width,
    )
    buckets = facts.size("relative_attention_num_buckets")
    weights = (
        Weights("decoder", "embedding", d.vocabulary, hidden, rows_in=1),
        *linear("text", width, hidden, count=3 * below, rows_in=positions),
        *linear("text", hidden, width, count=below, rows_in=positions),
        *linear("text", inner, hidden, count=below, rows_in=positions),
        *linear("text", hidden, inner, count=below, rows_in=positions),
        *norm("text", hidden, count=2 * below + 1, bias=False),
        *other("text", buckets, heads),
        *linear("decoder", width, hidden, count=4 * layers),
        *linear("decoder", hidden, width, count=2 * layers),
        *linear("decoder", width, hidden, count=2 * layers, rows_in=0),
        *linear("decoder", inner, hidden, count=layers),
        *linear("decoder", hidden, inner, count=layers),
        *norm("decoder", hidden, count=3 * layers + 1, bias=False),
        *other("decoder", buckets, heads),
    )
    return ModelShape("summariser", weights, text=text, decoder=d)


def _clip_vision(facts: ConfigFacts, side: int) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """Run at `side` pixels; the position table is the one trained at vision_config.image_size."""
    v = "vision_config."
    hidden, inner, patch = (
        facts.size(v + k) for k in ("hidden_size", "intermediate_size", "patch_size")
    )
    layers, heads = facts.size(v + "num_hidden_layers"), facts.size(v + "num_attention_heads")
    sequence = (side // patch) ** 2 + 1
    trained = (facts.size(v + "image_size") // patch) ** 2 + 1
    tower = EncoderShape(hidden, inner, heads, sequence, (sequence,) * layers, side=side)
    return tower, (
        *other("vision", hidden, 3 * patch**2 + 1),
        *other("vision", trained, hidden),
        *norm("vision", hidden, count=2),
        *plain_blocks("vision", layers, hidden, inner, sequence),
    )


def clip_text(facts: ConfigFacts) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """CLIP's text transformer without its projection; its sizes stand in text_config."""
    t = "text_config."
    hidden, inner = facts.size(t + "hidden_size"), facts.size(t + "intermediate_size")
    layers, heads = facts.size(t + "num_hidden_layers"), facts.size(t + "num_attention_heads")
    positions = facts.size(t + "max_position_embeddings")
    text = EncoderShape(hidden, inner, heads, positions, (positions,) * layers)
    return text, (
        Weights("text", "embedding", facts.size(t + "vocab_size"), hidden),
        *other("text", positions, hidden),
        *plain_blocks("text", layers, hidden, inner, positions),
        *norm("text", hidden),
    )


def _projections(
    facts: ConfigFacts, tower: EncoderShape, text: EncoderShape
) -> tuple[Weights, ...]:
    width = facts.size("projection_dim")
    return (
        *linear("vision", width, tower.hidden),
        *linear("text", width, text.hidden),
        *other("text", 1),
    )


def bert_text(
    facts: ConfigFacts, prefix: str, *, pooler: bool
) -> tuple[EncoderShape, tuple[Weights, ...]]:
    """BERT's part of a config, whose keys begin with `prefix`; `pooler`: with its own."""
    hidden, inner = facts.size(prefix + "hidden_size"), facts.size(prefix + "intermediate_size")
    layers = facts.size(prefix + "num_hidden_layers")
    heads = facts.size(prefix + "num_attention_heads")
    table = facts.size(prefix + "max_position_embeddings")
    positions = facts.size(prefix + "context_length", default=table)
    text = EncoderShape(hidden, inner, heads, positions, (positions,) * layers)
    return text, (
        Weights("text", "embedding", facts.size(prefix + "vocab_size"), hidden),
        *other("text", table + facts.size(prefix + "type_vocab_size"), hidden),
        *norm("text", hidden),
        *plain_blocks("text", layers, hidden, inner, positions),
        *(linear("text", hidden, hidden, bias=True) if pooler else ()),
    )
