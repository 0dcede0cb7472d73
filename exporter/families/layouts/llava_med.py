"""LLaVA-Med as it is published: the original LLaVA code's config, prompt and image settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.config import choice, count

# The image stands where the original code has the id -200, which is no row of the embedding: here it
# is <unk>, which this tokenizer never writes since it falls back to bytes.
LLAVA_MED_IMAGE = 0
LLAVA_MED_TOWER = "openai/clip-vit-large-patch14-336"
LLAVA_MED_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "sliding_window", "hidden_act", "attention_bias"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
SELECTED = {"patch": "default", "cls_patch": "full"}


def llava_med_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """LlavaConfig of LLaVA-Med's config.json (its ``llava_mistral`` is no class of transformers).

    ``vision_config`` may give other sizes than the tower that ``mm_vision_tower`` names. Raises
    `InputRefused` for a projector, tower or way of cutting images that it does not have.
    """
    choice(config, "mm_projector_type", "mlp2x_gelu", ("mlp2x_gelu",), "config")
    aspect = choice(config, "image_aspect_ratio", "pad", ("pad",), "config")
    kind = choice(config, "mm_vision_select_feature", "patch", tuple(SELECTED), "config")
    vision = config.get("vision_config")
    if vision is None:
        choice(config, "mm_vision_tower", LLAVA_MED_TOWER, (LLAVA_MED_TOWER,), "config")
    vision = {**LLAVA_MED_VISION, **(vision or {})}
    width = count(config, "mm_hidden_size", 1024, "config")
    if width != vision["hidden_size"]:
        raise InputRefused(
            f"config.json: mm_hidden_size is {width}, the tower's is {vision['hidden_size']}"
        )
    text = {key: config[key] for key in TEXT_KEYS if key in config}
    dtype = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": LLAVA_MED_IMAGE,
        "image_aspect_ratio": aspect,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": SELECTED[kind],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "text_config": {"model_type": "mistral", **text, **dtype},
        "vision_config": vision,
        **dtype,
    }


# The original code's "mistral_instruct" conversation: no system text, the image before the question.
LLAVA_MED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ ' ' + part['text'] + '</s>' }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
LLAVA_MED_IMAGES = {
    "image_processor_type": "LlavaImageProcessor",
    "do_pad": True,
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 336},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
