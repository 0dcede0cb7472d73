"""XrayGPT as its code keeps it: MiniGPT-4's module names around BLIP-2's parts and Vicuna's.

What is published are pickles in three places (EVA-ViT-g, the Q-Former, Vicuna with the projection's
checkpoint; github.com/mbzuai-oryx/XrayGPT at d0baa6a0: models/{mini_gpt4,blip2,eva_vit}.py), which are
not opened here. The layout is that of the whole model's state dict, saved as safetensors, beside
Vicuna's tokenizer.json and a config.json with ``"model_type": "mini_gpt4"`` and Vicuna's own config as
``text_config``; sizes that it leaves out are those of the published code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.config import choice, count
from exporter.families.layouts.joined import Joined

PUBLISHED_TYPE, PUBLISHED_CLASS = "mini_gpt4", "MiniGPT4"
MODEL_TYPE, CLASS = "blip-2", "Blip2ForConditionalGeneration"
# The only tower that the code has: EVA-ViT-g without its last block (create_eva_vit_g).
TOWER = "eva_clip_g"
VISION = {
    "model_type": "blip_2_vision_model",
    "hidden_size": 1408,
    "intermediate_size": 6144,  # int(1408 * 4.3637)
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
# bert-base-uncased with cross-attention in every second block.
QFORMER = {
    "model_type": "blip_2_qformer",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "cross_attention_frequency": 2,
}
QUERIES = 32
# The image stands in the text as embeddings, for no token: here in the place of <unk>, which this
# tokenizer never writes since it falls back to bytes.
IMAGE = 0
# An answer ends with "###", which is one token at the start of a word and two elsewhere.
STOPS = ("▁###", "##")
VIT, QFORMER_LAYER = "vision_model.encoder.layers.*", "qformer.encoder.layer.*"
BERT_LAYER = "Qformer.bert.encoder.layer.*"
# The more special name first: each is applied to what those before it gave.
NAMES = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    ("visual_encoder.blocks.*.norm1", f"{VIT}.layer_norm1"),
    ("visual_encoder.blocks.*.norm2", f"{VIT}.layer_norm2"),
    ("visual_encoder.blocks.*.attn.proj", f"{VIT}.self_attn.projection"),
    ("visual_encoder.blocks.*.attn", f"{VIT}.self_attn"),
    ("visual_encoder.blocks.*.mlp", f"{VIT}.mlp"),
    ("ln_vision", "vision_model.post_layernorm"),
    ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
    (f"{BERT_LAYER}.attention.self", f"{QFORMER_LAYER}.attention.attention"),
    (f"{BERT_LAYER}.crossattention.self", f"{QFORMER_LAYER}.crossattention.attention"),
    ("Qformer.bert.encoder", "qformer.encoder"),
    ("llama_proj", "language_projection"),
    ("llama_model", "language_model"),
)
# EVA's queries and values have a bias, its keys have none; the newest class has one for all three.
JOINS = (Joined("self_attn.qkv.bias", ("self_attn.q_bias", None, "self_attn.v_bias")),)
# As it was aligned with X-rays (prompt_template and prompts/alignment.txt): no system text.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '###Patient: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<Img><image></Img> ' }}{% endif %}{% endfor %}{% else %}{{ '###Doctor: ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '###Doctor: ' }}{% endif %}"
)
IMAGES = {
    "image_processor_type": "BlipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def xraygpt_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Blip2Config of a config.json of ours for XrayGPT; see the module. Raises `InputRefused`."""
    choice(config, "vit_model", TOWER, (TOWER,), "config")
    parts = {
        key: config.get(key) or {} for key in ("text_config", "vision_config", "qformer_config")
    }
    for key, part in parts.items():
        if not isinstance(part, Mapping):
            raise InputRefused(f"config.json: {key} is {part!r}; expected an object")
    text = parts["text_config"]
    choice(text, "model_type", "llama", ("llama",), "text_config")
    dtype = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "image_token_index": IMAGE,
        "num_query_tokens": count(config, "num_query_tokens", QUERIES, "config"),
        "stop_tokens": list(STOPS),
        "tie_word_embeddings": False,
        "use_decoder_only_language_model": True,
        "text_config": {"tie_word_embeddings": False, **text, "model_type": "llama"},
        "vision_config": {**VISION, **parts["vision_config"]},
        "qformer_config": {**QFORMER, **parts["qformer_config"]},
        **dtype,
    }
