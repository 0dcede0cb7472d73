"""Reads the shapes that several architectures share out of config facts."""

from __future__ import annotations

from exporter.families.shapes.facts import ConfigFacts
from exporter.families.shapes.parts import DecoderShape, EncoderShape, Weights, linear, other


def tower_shape(
    facts: ConfigFacts, prefix: str, *, sequence: int, tiles: int, side: int
) -> EncoderShape:
    """A vision transformer whose sizes stand under `prefix`, with full attention in every layer."""
    layers = facts.size(prefix + "num_hidden_layers")
    return EncoderShape(
        hidden=facts.size(prefix + "hidden_size"),
        inner=facts.size(prefix + "intermediate_size"),
        heads=facts.size(prefix + "num_attention_heads"),
        sequence=sequence,
        attended=(sequence,) * layers,
        tiles=tiles,
        side=side,
    )


def patch_embedding(
    hidden: int, patch: int, sequence: int, *, class_token: bool, bias: bool = False
) -> tuple[Weights, ...]:
    """Patch kernel, class token and position table of a vision transformer."""
    return (
        *other("vision", hidden, 3 * patch**2),
        *(other("vision", hidden) if bias else ()),
        *(other("vision", hidden) if class_token else ()),
        *other("vision", sequence, hidden),
    )


def decoder_shape(
    facts: ConfigFacts, *, image_tokens: int, quadratic: bool = False
) -> DecoderShape:
    """A decoder whose sizes stand in text_config, or at the top level, where some configs have them."""
    prefix = "text_config."

    def size(key: str, default: int | None = None) -> int:
        return facts.size(prefix + key, key, default=default)

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    tied = facts.flag("tie_word_embeddings", facts.flag(prefix + "tie_word_embeddings", False))
    return DecoderShape(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        inner=size("intermediate_size"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        vocabulary=size("vocab_size"),
        max_positions=size("max_position_embeddings"),
        image_tokens=image_tokens,
        tied=tied,
        quadratic=quadratic,
    )


def biased_decoder(d: DecoderShape) -> tuple[Weights, ...]:
    """Phi, GPT-2, OPT: four projections and two layers of an ungated MLP, all with bias."""
    return (
        *linear("decoder", d.hidden, d.hidden, count=4 * d.layers, bias=True),
        *linear("decoder", d.inner, d.hidden, count=d.layers, bias=True),
        *linear("decoder", d.hidden, d.inner, count=d.layers, bias=True),
    )
