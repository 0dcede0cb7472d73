"""Idefics3 and SmolVLM: SigLIP tower, pixel shuffle, one projection, Llama decoder.

Absent keys of a config.json take the defaults of transformers' config classes (Idefics3Config,
Idefics3VisionConfig, LlamaConfig): published SmolVLM configs leave many of them out. A null
counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import DecoderSpec, TowerSpec
from exporter.families.prompts import Idefics3Preparer, read_preparer

MODEL_TYPES = ("idefics3", "smolvlm")

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")
# Switches of the training code that change the network and that this family's files never set.
UNSUPPORTED = ("attention_bias", "mlp_bias", "qk_layer_norms", "rope_interleaved", "use_resampler")


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The Llama decoder of a parsed config.json. Raises `InputRefused` on a bad config."""
    text = _section(config, "text_config")
    where = "text_config"
    _choice(text, "model_type", "llama", ("llama",), where)
    _choice(text, "hidden_act", "silu", ("silu",), where)
    for key in UNSUPPORTED:
        if text.get(key):
            raise InputRefused(f"config.json: {where}.{key} is {text[key]!r}; only false is known")
    hidden = _count(text, "hidden_size", 4096, where)
    heads = _count(text, "num_attention_heads", 32, where)
    head_dim = _count(text, "head_dim", hidden // heads, where)
    kv_heads = _count(text, "num_key_value_heads", heads, where)
    if heads % kv_heads or head_dim % 2:
        raise InputRefused(
            f"config.json: {where} has {heads} heads of {head_dim} and {kv_heads} key-value heads; "
            "expected an even head_dim and heads divisible by key-value heads"
        )
    return DecoderSpec(
        hidden_size=hidden,
        layers=_count(text, "num_hidden_layers", 32, where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_count(text, "intermediate_size", 11008, where),
        vocab_size=_count(text, "vocab_size", 32000, where),
        norm_eps=_positive(text, "rms_norm_eps", 1e-6, where),
        rope_theta=_rope_theta(text),
        max_positions=_count(text, "max_position_embeddings", 2048, where),
        prefix="model.text_model.",
        embedding="model.text_model.embed_tokens.weight",
        final_norm="model.text_model.norm.weight",
        head="lm_head.weight",
        tied=_flag(config, "tie_word_embeddings", False),
    )


def tower_spec(config: Mapping[str, Any]) -> TowerSpec:
    """The vision tower and connector of a parsed config.json. Raises `InputRefused` on a bad config."""
    vision = _section(config, "vision_config")
    where = "vision_config"
    channels = _count(vision, "num_channels", 3, where)
    spec = TowerSpec(
        hidden_size=_count(vision, "hidden_size", 1152, where),
        layers=_count(vision, "num_hidden_layers", 12, where),
        heads=_count(vision, "num_attention_heads", 16, where),
        intermediate_size=_count(vision, "intermediate_size", 3072, where),
        patch_size=_count(vision, "patch_size", 32, where),
        image_size=_count(vision, "image_size", 224, where),
        norm_eps=_positive(vision, "layer_norm_eps", 1e-6, where),
        activation=_choice(vision, "hidden_act", ACTIVATIONS[0], ACTIVATIONS, where),
        shuffle=_count(config, "scale_factor", 2, "config"),
        output_size=_count(_section(config, "text_config"), "hidden_size", 4096, "text_config"),
        prefix="model.vision_model.",
        projection="model.connector.modality_projection.proj.weight",
    )
    if channels != 3 or spec.hidden_size % spec.heads:
        raise InputRefused(
            f"config.json: {where} has {channels} channels, hidden size {spec.hidden_size} and "
            f"{spec.heads} heads; expected 3 channels and a hidden size divisible by the heads"
        )
    if spec.patches < 1 or spec.patches % spec.shuffle:
        raise InputRefused(
            f"config.json: {spec.patches} patches a side ({spec.image_size} / {spec.patch_size}) "
            f"cannot be shuffled by scale_factor {spec.shuffle}; expected a multiple of it"
        )
    return spec


def open_preparer(model_dir: Path) -> Idefics3Preparer:
    """Tokenizer, chat template and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    return read_preparer(model_dir, config, decoder_spec(config), tower_spec(config))


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if not isinstance(value, Mapping):
        raise InputRefused(f"config.json: {key} is {value!r}; expected an object")
    return value


def _count(section: Mapping[str, Any], key: str, default: int, where: str) -> int:
    value = default if section.get(key) is None else section[key]
    if type(value) is not int or value < 1:
        raise InputRefused(f"config.json: {where}.{key} is {value!r}; expected a positive integer")
    return value


def _positive(section: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = default if section.get(key) is None else section[key]
    if type(value) not in (int, float) or not 0.0 < value < float("inf"):
        raise InputRefused(f"config.json: {where}.{key} is {value!r}; expected a positive number")
    return float(value)


def _flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    value = default if section.get(key) is None else section[key]
    if type(value) is not bool:
        raise InputRefused(f"config.json: {key} is {value!r}; expected true or false")
    return value


def _choice(
    section: Mapping[str, Any], key: str, default: str, known: tuple[str, ...], where: str
) -> str:
    value = default if section.get(key) is None else section[key]
    if value not in known:
        raise InputRefused(
            f"config.json: {where}.{key} is {value!r}; expected {' or '.join(known)}"
        )
    return str(value)


def _rope_theta(text: Mapping[str, Any]) -> float:
    # transformers 5 writes rope_parameters; published configs have rope_theta and rope_scaling.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputRefused(f"config.json: rope_parameters is {rope!r}; expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputRefused(f"config.json: rope_type is {kind!r}; only 'default' is known")
    source = rope if rope.get("rope_theta") is not None else text
    return _positive(source, "rope_theta", 10000.0, "text_config")
