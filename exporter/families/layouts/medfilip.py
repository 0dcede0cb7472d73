"""MedFILIP as its code keeps it: github.com/PerceptionComputingLab/MedFILIP at be7788c5, train/models.py.

The code is public, its weights are not. The layout is that code's state dict ("network" in its
checkpoints) saved as safetensors, beside tokenizer.json of openai/clip-vit-base-patch32, a
preprocessor_config.json with mean and deviation of the images that it was trained on (the code computes
them anew for every training set), and a config.json that needs to say no more than
``"model_type": "medfilip"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.families.config import choice, count, section
from exporter.families.specs.clip import LEGACY_END

MODEL_TYPE, CLASS = "medfilip", "MedFILIPModel"
RESNET, SIDE, SIZE = "resnet", 448, 768
# The published code's text model is that of a config from before transformers 4.31.
TEXT = {"model_type": "clip_text_model", "eos_token_id": LEGACY_END}


def medfilip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the published sizes where it says none. Raises `InputRefused` for its variant
    with EVA-02.
    """
    parts = {key: config.get(key) or {} for key in ("vision_config", "text_config")}
    vision, text = (section(parts, key) for key in parts)
    choice(vision, "model_type", RESNET, (RESNET,), "vision_config")
    return {
        **config,
        "architectures": [CLASS],
        "projection_dim": count(config, "projection_dim", SIZE, "config"),
        "vision_config": {"model_type": RESNET, "image_size": SIDE, **vision},
        "text_config": {**TEXT, **text},
    }
