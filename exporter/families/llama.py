"""The Llama decoder that many families share, read from the text part of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.families.config import choice, count, positive, rope_theta

# Switches that change the network and that no known checkpoint of these families sets.
UNSUPPORTED = ("attention_bias", "mlp_bias", "qk_layer_norms", "rope_interleaved", "use_resampler")


@dataclass(frozen=True)
class DecoderNames:
    """Where a family keeps its decoder: see `families.base.DecoderSpec`."""

    prefix: str
    embedding: str
    final_norm: str
    head: str


def llama_spec(
    text: Mapping[str, Any], names: DecoderNames, *, tied: bool, where: str = "text_config"
) -> DecoderSpec:
    """The decoder of the text part `text`, with LlamaConfig's defaults. Raises `InputRefused`."""
    choice(text, "hidden_act", "silu", ("silu",), where)
    for key in UNSUPPORTED:
        if text.get(key):
            raise InputRefused(f"config.json: {where}.{key} is {text[key]!r}; only false is known")
    hidden = count(text, "hidden_size", 4096, where)
    heads = count(text, "num_attention_heads", 32, where)
    head_dim = count(text, "head_dim", hidden // heads, where)
    kv_heads = count(text, "num_key_value_heads", heads, where)
    if heads % kv_heads or head_dim % 2:
        raise InputRefused(
            f"config.json: {where} has {heads} heads of {head_dim} and {kv_heads} key-value heads; "
            "expected an even head_dim and heads divisible by key-value heads"
        )
    return DecoderSpec(
        hidden_size=hidden,
        layers=count(text, "num_hidden_layers", 32, where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=count(text, "intermediate_size", 11008, where),
        vocab_size=count(text, "vocab_size", 32000, where),
        norm_eps=positive(text, "rms_norm_eps", 1e-6, where),
        rope_theta=rope_theta(text),
        max_positions=count(text, "max_position_embeddings", 2048, where),
        prefix=names.prefix,
        embedding=names.embedding,
        final_norm=names.final_norm,
        head=names.head,
        tied=tied,
    )
