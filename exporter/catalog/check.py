"""Holds a checkpoint's config.json against the published facts of its profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.catalog.bert_defaults import BERT, BIOMEDCLIP, MEDCLIP
from exporter.catalog.profiles import model_profiles
from exporter.catalog.schema import Facts, ModelProfile, Value
from exporter.core.errors import InputRefused

# What the config classes of transformers put where config.json has no key (published files leave
# out keys that equal the default). None: computed from other keys in `_computed`.
DEFAULTS: dict[str, dict[str, Value]] = {
    "bert": BERT,
    "biomedclip": BIOMEDCLIP,
    "medclip": MEDCLIP,
    "clip": {
        "projection_dim": 512,
        "text_config.hidden_size": 512,
        "text_config.intermediate_size": 2048,
        "text_config.num_hidden_layers": 12,
        "text_config.num_attention_heads": 8,
        "text_config.max_position_embeddings": 77,
        "text_config.vocab_size": 49408,
        "vision_config.hidden_size": 768,
        "vision_config.intermediate_size": 3072,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 12,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 32,
        "vision_config.layer_norm_eps": 1e-5,
    },
    "clipseg": {
        "projection_dim": 512,
        "reduce_dim": 64,
        "decoder_intermediate_size": 2048,
        "decoder_num_attention_heads": 4,
        "conditional_layer": 0,
        "extract_layers": (3, 6, 9),
        "use_complex_transposed_convolution": False,
        "text_config.hidden_size": 512,
        "text_config.intermediate_size": 2048,
        "text_config.num_hidden_layers": 12,
        "text_config.num_attention_heads": 8,
        "text_config.max_position_embeddings": 77,
        "text_config.vocab_size": 49408,
        "vision_config.hidden_size": 768,
        "vision_config.intermediate_size": 3072,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 12,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 32,
        "vision_config.layer_norm_eps": 1e-5,
    },
    "biomedclipseg": {
        "projection_dim": 512,
        "reduce_dim": 64,
        "decoder_intermediate_size": 2048,
        "decoder_num_attention_heads": 4,
        "conditional_layer": 0,
        "extract_layers": (3, 6, 9),
        "use_complex_transposed_convolution": True,
        "vision_config.hidden_size": 768,
        "vision_config.intermediate_size": 3072,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 12,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 16,
        "text_config.hidden_size": 768,
        "text_config.intermediate_size": 3072,
        "text_config.num_hidden_layers": 12,
        "text_config.num_attention_heads": 12,
        "text_config.vocab_size": 30522,
        "text_config.max_position_embeddings": 512,
        "text_config.type_vocab_size": 2,
        "text_config.context_length": 256,
    },
    "cris": {
        "input_size": 416,
        "clip_resolution": 224,
        "vision_width": 64,
        "vision_layers": (3, 4, 6, 3),
        "embed_dim": 1024,
        "text_width": 512,
        "text_layers": 12,
        "text_heads": 8,
        "vocab_size": 49408,
        "context_length": 77,
        "word_len": 17,
        "fpn_out": (256, 512, 1024),
        "num_layers": 3,
        "num_head": 8,
        "dim_ffn": 2048,
    },
    "t5": {
        "d_model": 512,
        "d_ff": 2048,
        "d_kv": 64,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "num_heads": 8,
        "vocab_size": 32128,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        # Not read by the class: what the published tokenizer and checkpoints are made for.
        "n_positions": 512,
    },
    "blip2": {
        "num_query_tokens": 32,
        "image_token_index": None,
        "tie_word_embeddings": None,
        # Computed by the class, whatever the file says.
        "use_decoder_only_language_model": True,
        "text_config.model_type": None,
        # OPTConfig's, whose own names the last two are; published files say which they mean.
        "text_config.hidden_size": 768,
        "text_config.num_hidden_layers": 12,
        "text_config.num_attention_heads": 12,
        "text_config.vocab_size": 50272,
        "text_config.max_position_embeddings": 2048,
        "text_config.ffn_dim": 3072,
        "text_config.word_embed_proj_dim": None,
        # LlamaConfig's alone.
        "text_config.intermediate_size": 11008,
        "text_config.num_key_value_heads": None,
        "text_config.rms_norm_eps": 1e-6,
        "vision_config.hidden_size": 1408,
        "vision_config.intermediate_size": 6144,
        "vision_config.num_hidden_layers": 39,
        "vision_config.num_attention_heads": 16,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 14,
        "vision_config.layer_norm_eps": 1e-6,
        "qformer_config.vocab_size": 30522,
        "qformer_config.hidden_size": 768,
        "qformer_config.intermediate_size": 3072,
        "qformer_config.num_hidden_layers": 12,
        "qformer_config.num_attention_heads": 12,
        "qformer_config.encoder_hidden_size": 1408,
        "qformer_config.cross_attention_frequency": 2,
    },
    "idefics": {
        "tie_word_embeddings": False,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "additional_vocab_size": 0,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "cross_layer_interval": 1,
        "qk_layer_norms": False,
        "use_resampler": False,
        "alpha_type": "float",
        "vision_config.embed_dim": 768,
        "vision_config.image_size": 224,
        "vision_config.intermediate_size": 5120,
        "vision_config.patch_size": 14,
        "vision_config.num_attention_heads": 16,
        "vision_config.num_hidden_layers": 32,
        "perceiver_config.qk_layer_norms_perceiver": False,
        "perceiver_config.resampler_depth": 6,
        "perceiver_config.resampler_head_dim": 96,
        "perceiver_config.resampler_n_heads": 16,
        "perceiver_config.resampler_n_latents": 64,
    },
    "idefics3": {
        "image_token_id": 128257,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "text_config.hidden_size": 4096,
        "text_config.intermediate_size": 11008,
        "text_config.num_hidden_layers": 32,
        "text_config.num_attention_heads": 32,
        "text_config.num_key_value_heads": None,
        "text_config.head_dim": None,
        "text_config.vocab_size": 32000,
        "text_config.max_position_embeddings": 2048,
        "text_config.rms_norm_eps": 1e-6,
        "text_config.rope_theta": 10000.0,
        "vision_config.hidden_size": 1152,
        "vision_config.intermediate_size": 3072,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 16,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 32,
        "vision_config.layer_norm_eps": 1e-6,
    },
    "llava": {
        "image_token_index": 32000,
        "use_image_newline_parameter": True,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config.model_type": "llama",
        "text_config.hidden_size": 4096,
        "text_config.intermediate_size": 11008,
        "text_config.num_hidden_layers": 32,
        "text_config.num_attention_heads": 32,
        "text_config.num_key_value_heads": None,
        "text_config.head_dim": None,
        "text_config.vocab_size": 32000,
        "text_config.max_position_embeddings": 2048,
        "text_config.rms_norm_eps": 1e-6,
        "text_config.rope_theta": 10000.0,
        "vision_config.hidden_size": 768,
        "vision_config.intermediate_size": 3072,
        "vision_config.num_hidden_layers": 12,
        "vision_config.num_attention_heads": 12,
        "vision_config.image_size": 224,
        "vision_config.patch_size": 32,
        "vision_config.layer_norm_eps": 1e-5,
        # LLaVA-Med's own keys beside each other, read with MistralConfig's defaults.
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "mm_hidden_size": 1024,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
    },
    "moondream": {
        # Of the published code: the published config.json holds none of these.
        "prefix_attention": 730,
        "text_config.model_type": "phi",
        "text_config.hidden_size": 2048,
        "text_config.intermediate_size": 8192,
        "text_config.num_hidden_layers": 24,
        "text_config.num_attention_heads": 32,
        "text_config.hidden_act": "gelu_new",
        "text_config.vocab_size": 51200,
        "text_config.max_position_embeddings": 2048,
        "text_config.layer_norm_eps": 1e-5,
        "text_config.rope_theta": 10000.0,
        "text_config.partial_rotary_factor": 0.5,
        "text_config.tie_word_embeddings": False,
        "vision_config.hidden_size": 1152,
        "vision_config.intermediate_size": 4304,
        "vision_config.num_hidden_layers": 27,
        "vision_config.num_attention_heads": 16,
        "vision_config.patch_size": 14,
        "vision_config.image_size": 378,
        "vision_config.layer_norm_eps": 1e-5,
        "vision_config.projection_inner_size": 8192,
        "vision_config.max_crops": 12,
        "vision_config.overlap_margin": 4,
    },
    "qwen_vl": {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_scaling.mrope_section": (16, 24, 24),
        "vision_config.depth": 32,
        "vision_config.num_heads": 16,
        "vision_config.embed_dim": 1280,
        "vision_config.hidden_size": 3584,
        "vision_config.mlp_ratio": 4,
        "vision_config.intermediate_size": 3420,
        "vision_config.out_hidden_size": 3584,
        "vision_config.in_chans": 3,
        "vision_config.patch_size": 14,
        "vision_config.spatial_merge_size": 2,
        "vision_config.temporal_patch_size": 2,
        "vision_config.tokens_per_second": 4,
        "vision_config.window_size": 112,
        "vision_config.fullatt_block_indexes": (7, 15, 23, 31),
    },
    "vision_encoder_decoder": {
        "decoder_start_token_id": None,
        "decoder.model_type": None,
        "decoder.n_positions": 1024,
        "decoder.n_embd": 768,
        "decoder.n_head": 12,
        "decoder.n_layer": 12,
        "decoder.vocab_size": 50257,
        "decoder.layer_norm_epsilon": 1e-5,
        "decoder.activation_function": "gelu_new",
        "decoder.add_cross_attention": False,
        "decoder.tie_word_embeddings": True,
        "encoder.model_type": None,
        "encoder.hidden_size": 768,
        "encoder.intermediate_size": 3072,
        "encoder.num_hidden_layers": 12,
        "encoder.num_attention_heads": 12,
        "encoder.image_size": 224,
        "encoder.patch_size": 16,
        "encoder.num_channels": 3,
        "encoder.qkv_bias": True,
        "encoder.layer_norm_eps": 1e-12,
    },
}
# A plug-in's config.json is CLIP's with a section more.
DEFAULTS["medbridge"] = DEFAULTS["clip"] | {
    "bridge_config.grid": 2,
    "bridge_config.num_queries": 16,
    "bridge_config.num_hidden_layers": 2,
}
# Families whose published config.json has the decoder's settings beside vision_config.
FLAT = frozenset({"qwen_vl"})


def check_config(profile: ModelProfile, config: Mapping[str, Any]) -> None:
    """Compare a parsed config.json with the facts that were read for this checkpoint.

    Keys that are absent count with the class's default; facts that are null or only inferred are
    not compared. Raises `InputRefused` naming the first difference and the profile that fits.
    """
    wrong = differences(profile, config)
    if not wrong:
        return
    fits = [
        (len(_compared(other.facts)), other.name)
        for other in model_profiles().values()
        if _compared(other.facts) and not differences(other, config)
    ]
    advice = f"use --model {max(fits)[1]}" if fits else "give the folder itself: --model DIR"
    more = f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
    raise InputRefused(f"this is not {profile.title}: {wrong[0]}{more}; {advice}")


def differences(profile: ModelProfile, config: Mapping[str, Any]) -> list[str]:
    """One phrase for each fact that `config` contradicts: ``hidden_size is 576, expected 960``."""
    facts = profile.facts
    expected: dict[str, Value] = {"model_type": facts.model_type}
    if config.get("architectures"):
        expected["architectures"] = facts.architecture
    expected |= _compared(facts)
    phrases = []
    for key, value in expected.items():
        found = config_value(config, key, profile.family)
        if not _same(found, value):
            phrases.append(f"{key} is {found}, expected {value}")
    return phrases


def config_value(config: Mapping[str, Any], key: str, family: str) -> Any:
    """The value at a dotted `key`, or what the family's config class puts there when absent."""
    if key == "architectures":
        return config["architectures"][0]
    if family in FLAT:
        config = _flat(config)
    section, _, leaf = key.rpartition(".")
    place = config.get(section, {}) if section else config
    if not isinstance(place, Mapping):
        raise InputRefused(f"config.json: {section} is {place!r}; expected an object")
    if place.get(leaf) is not None:
        return place[leaf]
    if leaf == "rope_theta" and isinstance(place.get("rope_parameters"), Mapping):
        # transformers 5 writes the rotary settings as one object.
        return place["rope_parameters"].get("rope_theta")
    default = DEFAULTS.get(family, {}).get(key)
    return _computed(config, key, family) if default is None else default


def _flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The published, flat form of a config.json that transformers 5 wrote with a text_config."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    own = {k: v for k, v in config.items() if v is not None and k != "text_config"}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return {**text, "rope_scaling": rope, "rope_parameters": rope, **own}


def _computed(config: Mapping[str, Any], key: str, family: str) -> Any:
    section, _, leaf = key.rpartition(".")
    if leaf == "num_key_value_heads":
        return config_value(config, f"{section}.num_attention_heads", family)
    if leaf == "head_dim":
        size = config_value(config, f"{section}.hidden_size", family)
        heads = config_value(config, f"{section}.num_attention_heads", family)
        whole = type(size) is int and type(heads) is int and heads > 0
        return size // heads if whole else None
    return None


def _compared(facts: Facts) -> dict[str, Value]:
    return {key: value for key, value in facts.config.items() if value is not None}


def _same(found: Any, expected: Value) -> bool:
    numbers = (int, float)
    if isinstance(expected, tuple):
        whole = isinstance(found, list | tuple) and len(found) == len(expected)
        return whole and all(map(_same, found, expected))
    if type(found) in numbers and type(expected) in numbers:
        return math.isclose(found, float(expected), rel_tol=1e-9)  # type: ignore[arg-type]
    return type(found) is type(expected) and bool(found == expected)
