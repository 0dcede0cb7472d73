"""Specs of LLaVA configs against the config classes of transformers and the published sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlavaConfig, LlavaNextConfig

from exporter.catalog.profiles import model_profiles
from exporter.core.errors import InputRefused
from exporter.families.captioners.llava import decoder_spec, tower_spec
from exporter.families.check import config_value
from exporter.families.specs.clip_tower import UNUSED
from exporter.families.table import config_defaults

# As published, with the keys that are left out there left out here.
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}
COMMON = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
LLAVA_15: dict[str, Any] = {
    **COMMON,
    "model_type": "llava",
    "text_config": VICUNA,
    "vision_config": VISION,
}
NEXT_VICUNA: dict[str, Any] = {**LLAVA_15, "model_type": "llava_next"}
NEXT_MISTRAL: dict[str, Any] = {**NEXT_VICUNA, "text_config": MISTRAL}
SPARSE: dict[str, Any] = {"model_type": "llava_next", "text_config": {}, "vision_config": {}}
BARE: dict[str, Any] = {"model_type": "llava", "text_config": {}}
# LLaVA-Med's, as far as it is known.
LLAVA_MED: dict[str, Any] = {
    "model_type": "llava_mistral",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32000,
}


def filled(config: dict[str, Any]) -> Any:
    kind = LlavaNextConfig if config["model_type"] == "llava_next" else LlavaConfig
    return kind(**{k: v for k, v in config.items() if k != "model_type"})


@pytest.mark.parametrize("config", [LLAVA_15, NEXT_VICUNA, NEXT_MISTRAL, SPARSE, BARE])
def test_specs_fill_in_what_transformers_does(config: dict[str, Any]) -> None:
    spec, vision, reference = decoder_spec(config), tower_spec(config), filled(config)
    text, tower = reference.text_config, reference.vision_config
    assert spec.hidden_size == vision.output_size == text.hidden_size
    assert spec.intermediate_size == text.intermediate_size
    assert spec.layers == text.num_hidden_layers
    assert (spec.heads, spec.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert spec.vocab_size == text.vocab_size
    assert spec.norm_eps == text.rms_norm_eps
    assert spec.rope_theta == text.rope_parameters["rope_theta"]
    assert spec.max_positions == text.max_position_embeddings
    assert spec.tied == reference.tie_word_embeddings
    assert vision.tower.hidden_size == tower.hidden_size
    assert vision.tower.intermediate_size == tower.intermediate_size
    assert vision.tower.layers == tower.num_hidden_layers
    assert vision.tower.used_layers == tower.num_hidden_layers - 1
    assert vision.tower.heads == tower.num_attention_heads
    assert (vision.tower.patch_size, vision.tower.image_size) == (
        tower.patch_size,
        tower.image_size,
    )
    assert vision.tower.norm_eps == tower.layer_norm_eps
    assert vision.tower.activation == tower.hidden_act
    assert vision.tokens == (tower.image_size // tower.patch_size) ** 2
    assert bool(vision.newline) == (config["model_type"] == "llava_next")


@pytest.mark.parametrize("kind", [LlavaConfig, LlavaNextConfig])
def test_profiles_are_read_with_the_defaults_of_the_classes(kind: Any) -> None:
    parts = {"text_config": {"model_type": "llama"}, "vision_config": {"patch_size": 32}}
    config = kind(**parts).to_dict()
    empty: dict[str, Any] = {"text_config": {}, "vision_config": {}}
    # The others are LLaVA-Med's, or were dropped by transformers 5.
    known = [k for k in config_defaults("llava") if "." in k or k in config]
    for key in known:
        section, _, leaf = key.rpartition(".")
        place = config[section] if section else config
        real = place["rope_parameters"][leaf] if leaf == "rope_theta" else place[leaf]
        assert config_value(empty, key, "llava") == real, key


@pytest.mark.parametrize(
    ("profile", "config"),
    [
        ("llava-1.5-7b", LLAVA_15),
        ("llava-v1.6-vicuna-7b", NEXT_VICUNA),
        ("llava-v1.6-mistral-7b", NEXT_MISTRAL),
        ("llava-med-v1.5-mistral-7b", LLAVA_MED),
    ],
)
def test_parameters_are_those_of_the_published_files(profile: str, config: dict[str, Any]) -> None:
    facts = model_profiles()[profile].facts
    tensors = [*decoder_spec(config).tensors(), *tower_spec(config).tensors()]
    assert len({t.name for t in tensors}) == len(tensors)
    assert sum(math.prod(t.shape) for t in tensors) == facts.parameters
    assert facts.tensors in (None, len(tensors))


def test_mistrals_defaults_are_its_own() -> None:
    config = {**SPARSE, "text_config": {"model_type": "mistral", "sliding_window": None}}
    spec, text = decoder_spec(config), filled(config).text_config
    assert (spec.kv_heads, spec.intermediate_size) == (8, 14336)
    assert spec.max_positions == text.max_position_embeddings
    # Absent, the window is 4096, and the context ends with it.
    without = {**SPARSE, "text_config": {"model_type": "mistral"}}
    assert filled(without).text_config.sliding_window == decoder_spec(without).max_positions == 4096


@pytest.mark.parametrize(
    ("layer", "used"), [(-1, 24), (-2, 23), (-24, 1), (1, 1), (24, 24), (None, 23)]
)
def test_feature_layers_count_as_hidden_states(layer: int | None, used: int) -> None:
    vision = tower_spec({**LLAVA_15, "vision_feature_layer": layer})
    assert vision.tower.used_layers == used
    unused = [t for t in vision.tensors() if not t.used]
    assert {t.reason for t in unused} == {UNUSED}
    assert {t.role for t in unused} == {"float"}
    assert len(unused) == 16 * (24 - used) + 2


def test_the_class_token_is_a_row_of_strategy_full() -> None:
    assert tower_spec({**LLAVA_15, "vision_feature_select_strategy": "full"}).tokens == 577
    with pytest.raises(InputRefused, match="vision_feature_select_strategy is 'full'"):
        tower_spec({**NEXT_VICUNA, "vision_feature_select_strategy": "full"})


def test_llava_med_is_llava_with_mistral() -> None:
    assert decoder_spec(LLAVA_MED) == replace(decoder_spec(NEXT_MISTRAL), vocab_size=32000)
    assert tower_spec(LLAVA_MED) == tower_spec(LLAVA_15)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "vision_feature_layer", -25),
        ("", "vision_feature_layer", 0),
        ("", "vision_feature_layer", [-2, -5]),
        ("", "vision_feature_select_strategy", "cls"),
        ("", "projector_hidden_act", "silu"),
        ("", "multimodal_projector_bias", False),
        ("", "text_config", None),
        ("text_config", "model_type", "qwen2"),
        ("text_config", "attention_bias", True),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("vision_config", "model_type", "siglip_vision_model"),
        ("vision_config", "hidden_act", "silu"),
        ("vision_config", "num_attention_heads", 15),
        ("vision_config", "image_size", 10),
        ("vision_config", "num_channels", 1),
    ],
)
def test_bad_values_are_refused(section: str, key: str, value: object) -> None:
    part = {**(LLAVA_15[section] if section else LLAVA_15), key: value}
    config = {**LLAVA_15, section: part} if section else part
    read = decoder_spec if section == "text_config" else tower_spec
    with pytest.raises(InputRefused, match=r"config\.json"):
        read(config)


@pytest.mark.parametrize("window", [0, -1, "4096", 4096.5])
def test_a_window_that_is_no_length_is_refused(window: object) -> None:
    with pytest.raises(InputRefused, match="sliding_window"):
        decoder_spec({**NEXT_MISTRAL, "text_config": {**MISTRAL, "sliding_window": window}})
