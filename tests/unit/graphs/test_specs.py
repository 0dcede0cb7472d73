"""Specs of Idefics3 configs against the config classes of transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Idefics3Config

from exporter.core.errors import InputRefused
from exporter.families.captioners.idefics3 import decoder_spec, tower_spec

# As published, with the keys that are left out there left out here.
SMOLVLM2_500M: dict[str, Any] = {
    "model_type": "smolvlm",
    "scale_factor": 4,
    "tie_word_embeddings": False,
    "text_config": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "max_position_embeddings": 8192,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
}
SPARSE: dict[str, Any] = {
    "model_type": "idefics3",
    "scale_factor": None,
    "text_config": {"hidden_size": 2048, "rope_scaling": None},
    "vision_config": {"image_size": 384, "patch_size": 16},
}
NEW_ROPE: dict[str, Any] = {
    **SPARSE,
    "tie_word_embeddings": True,
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


def filled(config: dict[str, Any]) -> Idefics3Config:
    known = {k: v for k, v in config.items() if k != "model_type" and v is not None}
    return Idefics3Config(**known)


@pytest.mark.parametrize("config", [SMOLVLM2_500M, SPARSE, NEW_ROPE])
def test_decoder_spec_fills_in_what_transformers_does(config: dict[str, Any]) -> None:
    spec, reference = decoder_spec(config), filled(config)
    text = reference.text_config
    assert spec.hidden_size == text.hidden_size
    assert spec.intermediate_size == text.intermediate_size
    assert spec.layers == text.num_hidden_layers
    assert (spec.heads, spec.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert spec.head_dim == text.head_dim
    assert spec.vocab_size == text.vocab_size
    assert spec.norm_eps == text.rms_norm_eps
    assert spec.rope_theta == text.rope_parameters["rope_theta"]
    assert spec.max_positions == text.max_position_embeddings
    assert spec.tied == reference.tie_word_embeddings


@pytest.mark.parametrize("config", [SMOLVLM2_500M, SPARSE])
def test_tower_spec_fills_in_what_transformers_does(config: dict[str, Any]) -> None:
    spec, reference = tower_spec(config), filled(config)
    vision = reference.vision_config
    assert spec.hidden_size == vision.hidden_size
    assert spec.intermediate_size == vision.intermediate_size
    assert spec.layers == vision.num_hidden_layers
    assert spec.heads == vision.num_attention_heads
    assert (spec.patch_size, spec.image_size) == (vision.patch_size, vision.image_size)
    assert spec.norm_eps == vision.layer_norm_eps
    assert spec.activation == vision.hidden_act
    assert spec.shuffle == reference.scale_factor
    assert spec.output_size == reference.text_config.hidden_size


def test_tokens_per_tile_of_the_published_models() -> None:
    assert tower_spec(SMOLVLM2_500M).tokens == 64
    large = {
        "scale_factor": 3,
        "text_config": {"hidden_size": 2048},
        "vision_config": {"image_size": 384, "patch_size": 14, "num_hidden_layers": 27},
    }
    assert tower_spec(large).tokens == 81


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_config", "hidden_size", "960"),
        ("text_config", "hidden_size", 0),
        ("text_config", "num_hidden_layers", True),
        ("text_config", "num_key_value_heads", 4),
        ("text_config", "rms_norm_eps", -1e-5),
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "model_type", "mistral"),
        ("text_config", "attention_bias", True),
        ("text_config", "qk_layer_norms", True),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config", "rope_scaling", "linear"),
        ("text_config", "rope_theta", 0),
        ("vision_config", "num_channels", 1),
        ("vision_config", "num_attention_heads", 11),
        ("vision_config", "image_size", [512, 512]),
        ("vision_config", "patch_size", 20),
        ("vision_config", "hidden_act", "silu"),
    ],
)
def test_bad_values_are_refused(section: str, key: str, value: object) -> None:
    config = {**SMOLVLM2_500M, section: {**SMOLVLM2_500M[section], key: value}}
    read = decoder_spec if section == "text_config" else tower_spec
    with pytest.raises(InputRefused, match=r"config\.json"):
        read(config)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_missing_sections_are_refused(key: str) -> None:
    config = {k: v for k, v in SMOLVLM2_500M.items() if k != key}
    read = decoder_spec if key == "text_config" else tower_spec
    with pytest.raises(InputRefused, match=key):
        read(config)


def test_a_flag_of_another_type_is_refused() -> None:
    with pytest.raises(InputRefused, match="tie_word_embeddings"):
        decoder_spec({**SMOLVLM2_500M, "tie_word_embeddings": "no"})
