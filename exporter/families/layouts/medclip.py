"""MedCLIP as its code keeps it (github.com/RyanWangZf/MedCLIP at 9c3396f2, medclip/modeling_medclip.py).

Published are zip files with pickles, which are not opened here. The layout is such a state dict saved
as safetensors, beside BioClinicalBERT's tokenizer.json and a config.json that needs to say no more than
``"model_type": "medclip"``, and for its first variant that ``vision_config`` has the model_type
``resnet``. Absent sizes are those of microsoft/swin-tiny-patch4-window7-224, torchvision's resnet50 and
BioClinicalBERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.families.config import choice, section
from exporter.families.layouts.bert import POOLER
from exporter.families.specs.swin import INDEX, OLDER

MODEL_TYPE, CLASS = "medclip", "MedCLIPModel"
VISION_PREFIX, TEXT_PREFIX = "vision_model.model.", "text_model.model."
BLOCK = f"{VISION_PREFIX}encoder.layers.*.blocks.*."
OLD_NAMES = tuple((BLOCK + old, BLOCK + new) for old, new in OLDER)
LEFT_OUT = {
    "text_model.model.pooler": POOLER,
    f"{BLOCK}attention.relative_position_bias.relative_position_index": INDEX,
}
SWIN, RESNET = "swin", "resnet"
VISION = {"model_type": SWIN, "image_size": 224}
TEXT = {
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 28996,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    # The published processor sets its tokenizer's limit to CLIP's.
    "context_length": 77,
}
PROCESSOR = "MedCLIPFeatureExtractor"
IMAGES = {
    "image_processor_type": PROCESSOR,
    "resample": 3,
    "image_mean": 0.5862785803043838,
    "image_std": 0.27950088968644304,
}


def medclip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the published sizes where it says none. Raises `InputRefused` for other towers."""
    parts = {key: config.get(key) or {} for key in ("vision_config", "text_config")}
    vision, text = (section(parts, key) for key in parts)
    choice(vision, "model_type", SWIN, (SWIN, RESNET), "vision_config")
    return {
        **config,
        "architectures": [CLASS],
        "vision_config": {**VISION, **vision},
        "text_config": {**TEXT, **text},
    }
