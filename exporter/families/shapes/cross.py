"""Shapes of models whose decoder reaches the image by cross-attention or through a few queries."""

from __future__ import annotations

import math
from dataclasses import replace

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import (
    DecoderShape,
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
from exporter.families.shapes.read import (
    biased_decoder,
    decoder_shape,
    patch_embedding,
    tower_shape,
)


def idefics(facts: ConfigFacts) -> ModelShape:
    """IDEFICS: ViT-H, perceiver resampler, gated cross-attention in every n-th block of a Llama."""
    t = "vision_config."
    hidden, inner = facts.size(t + "embed_dim"), facts.size(t + "intermediate_size")
    layers, patch = facts.size(t + "num_hidden_layers"), facts.size(t + "patch_size")
    side = facts.size(t + "image_size")
    sequence = (side // patch) ** 2 + 1
    heads = facts.size(t + "num_attention_heads")
    tower = EncoderShape(hidden, inner, heads, sequence, (sequence,) * layers, side=side)
    latents = facts.size("perceiver_config.resampler_n_latents")
    every = facts.size("cross_layer_interval")
    base = decoder_shape(facts, image_tokens=3)
    cross = base.layers // every
    d = replace(base, cross_layers=cross, cross_tokens=latents, cross_width=base.hidden)
    weights = (
        *patch_embedding(hidden, patch, sequence, class_token=True),
        *norm("vision", hidden, count=2),
        *plain_blocks("vision", layers, hidden, inner, sequence),
        *_perceiver(facts, hidden, latents, sequence),
        # Rows of the table and the head for the image markers, kept apart from both.
        *other("decoder", 2 * facts.size("additional_vocab_size"), d.hidden),
        *llama_decoder(d),
        *_cross_blocks(d, hidden, cross, norms=facts.flag("qk_layer_norms", False)),
    )
    return ModelShape("captioner", weights, tower, decoder=d)


def vision_encoder_decoder(facts: ConfigFacts) -> ModelShape:
    """ViT and GPT-2 with cross-attention in every block; no image token in the prompt."""
    side, patch = facts.size("encoder.image_size"), facts.size("encoder.patch_size")
    sequence = (side // patch) ** 2 + 1
    tower = tower_shape(facts, "encoder.", sequence=sequence, tiles=1, side=side)
    hidden, layers = facts.size("decoder.n_embd"), facts.size("decoder.n_layer")
    heads = facts.size("decoder.n_head")
    d = DecoderShape(
        layers=layers,
        hidden=hidden,
        inner=facts.size("decoder.n_inner", default=4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=facts.size("decoder.vocab_size"),
        max_positions=facts.size("decoder.n_positions"),
        image_tokens=0,
        tied=facts.flag("decoder.tie_word_embeddings", True),
        cross_layers=layers,
        cross_tokens=sequence,
        cross_width=hidden,
    )
    weights = (
        *patch_embedding(tower.hidden, patch, sequence, class_token=True, bias=True),
        *plain_blocks("vision", len(tower.attended), tower.hidden, tower.inner, sequence),
        *norm("vision", tower.hidden),
        *linear("vision", tower.hidden, tower.hidden, bias=True),  # pooler
        *embedding(d),
        *other("decoder", d.max_positions, hidden),
        *biased_decoder(d),
        *linear("decoder", hidden, hidden, count=2 * layers, bias=True),
        *linear("decoder", 2 * hidden, hidden, count=layers, bias=True, rows_in=0),
        *norm("decoder", hidden, count=3 * layers + 1),
    )
    return ModelShape("captioner", weights, tower, decoder=d)


def blip2(facts: ConfigFacts) -> ModelShape:
    """BLIP-2 and XrayGPT: EVA-ViT-g, Q-Former with a few queries, one projection, OPT or Llama."""
    t = "vision_config."
    side, patch = facts.size(t + "image_size"), facts.size(t + "patch_size")
    sequence = (side // patch) ** 2 + 1
    tower = tower_shape(facts, t, sequence=sequence, tiles=1, side=side)
    queries = facts.size("num_query_tokens")
    text = str(facts.values.get("text_config.model_type"))
    if text == "opt":
        d = _opt_shape(facts, queries)
        decoder = (
            *embedding(d),
            *other("decoder", d.max_positions + 2, d.hidden),
            *biased_decoder(d),
            *norm("decoder", d.hidden, count=2 * d.layers + 1),
        )
    else:
        d = decoder_shape(facts, image_tokens=queries)
        decoder = llama_decoder(d)
    weights = (
        *patch_embedding(tower.hidden, patch, sequence, class_token=True, bias=True),
        *plain_blocks("vision", len(tower.attended), tower.hidden, tower.inner, sequence),
        *norm("vision", tower.hidden),
        *_qformer(facts, queries, tower),
        *linear(
            "vision", d.hidden, facts.size("qformer_config.hidden_size"), bias=True, rows_in=queries
        ),
        *decoder,
    )
    return ModelShape("captioner", weights, tower, decoder=d)


def _opt_shape(facts: ConfigFacts, queries: int) -> DecoderShape:
    t = "text_config."
    hidden, heads = facts.size(t + "hidden_size"), facts.size(t + "num_attention_heads")
    return DecoderShape(
        layers=facts.size(t + "num_hidden_layers"),
        hidden=hidden,
        inner=facts.size(t + "ffn_dim"),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=facts.size(t + "vocab_size"),
        max_positions=facts.size(t + "max_position_embeddings"),
        image_tokens=queries,
        tied=facts.flag("tie_word_embeddings", True),
    )


def _perceiver(facts: ConfigFacts, hidden: int, latents: int, sequence: int) -> tuple[Weights, ...]:
    p = "perceiver_config."
    depth, width = facts.size(p + "resampler_depth"), facts.size(p + "resampler_head_dim")
    inner = width * facts.size(p + "resampler_n_heads")
    seen = sequence + latents
    head_norms = 2 * depth if facts.flag(p + "qk_layer_norms_perceiver", False) else 0
    return (
        *other("vision", latents, hidden),
        *linear("vision", inner, hidden, count=depth, rows_in=latents),
        *linear("vision", inner, hidden, count=2 * depth, rows_in=seen),
        *linear("vision", hidden, inner, count=depth, rows_in=latents),
        *linear("vision", 4 * hidden, hidden, count=depth, rows_in=latents),
        *linear("vision", hidden, 4 * hidden, count=depth, rows_in=latents),
        *norm("vision", hidden, count=3 * depth + 1),
        *norm("vision", width, count=head_norms),
    )


def _cross_blocks(d: DecoderShape, source: int, count: int, *, norms: bool) -> tuple[Weights, ...]:
    """Gated cross-attention blocks of IDEFICS; their keys and values are made once per image."""
    return (
        *linear("decoder", d.hidden, d.hidden, count=2 * count),
        *linear("decoder", d.hidden, source, count=2 * count, rows_in=0),
        *gated_mlp("decoder", count, d.hidden, d.inner),
        *norm("decoder", d.hidden, count=2 * count, bias=False),
        *norm("decoder", d.head_dim, count=2 * count if norms else 0, bias=False),
        *other("decoder", 2, count=count),
    )


def _qformer(facts: ConfigFacts, queries: int, tower: EncoderShape) -> tuple[Weights, ...]:
    q = "qformer_config."
    hidden, inner = facts.size(q + "hidden_size"), facts.size(q + "intermediate_size")
    layers = facts.size(q + "num_hidden_layers")
    cross = math.ceil(layers / facts.size(q + "cross_attention_frequency"))
    return (
        *other("vision", queries, hidden),
        *norm("vision", hidden, count=1 + cross),
        *plain_blocks("vision", layers, hidden, inner, queries),
        *linear("vision", hidden, hidden, count=2 * cross, bias=True, rows_in=queries),
        *linear("vision", hidden, tower.hidden, count=2 * cross, bias=True, rows_in=tower.sequence),
    )
