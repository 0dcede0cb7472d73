"""The Llama decoder that many families share, and Mistral's, read from the text part of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec
from exporter.families.config import choice, count, positive, rope_theta
from exporter.families.specs.decoder import TextDecoder

# Switches that change the network and that no known checkpoint of these families sets.
UNSUPPORTED = ("attention_bias", "mlp_bias", "qk_layer_norms", "rope_interleaved", "use_resampler")

# Where MistralConfig's defaults are other than LlamaConfig's.
MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


# What to do instead, for `require_llama`.
NO_CALIBRATION = "use int4-hqq or int4-rtn"
NO_FORMAT = "use the exported graphs, this format is not written or read for it"


def require_llama(decoder: TextDecoder, what: str, *, instead: str = NO_CALIBRATION) -> DecoderSpec:
    """The decoder as the Llama kind. Raises `InputRefused` when it is another; `what` needs it."""
    if not isinstance(decoder, DecoderSpec):
        raise InputRefused(
            f"{what} works with Llama decoders alone, this model's is a {type(decoder).__name__}; "
            f"{instead}"
        )
    return decoder


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


def mistral_spec(text: Mapping[str, Any], names: DecoderNames, *, tied: bool) -> DecoderSpec:
    """The decoder of the text part `text`, with MistralConfig's defaults. Raises `InputRefused`.

    Within a sliding window (arXiv 2310.06825) attention is full and causal, so that a model with one
    is a Llama whose context ends with the window; longer texts are not offered.
    """
    filled = {**MISTRAL, **text}
    spec = llama_spec(filled, names, tied=tied)
    if filled["sliding_window"] is None:
        return spec
    window = count(filled, "sliding_window", 4096, "text_config")
    return replace(spec, max_positions=min(spec.max_positions, window))
