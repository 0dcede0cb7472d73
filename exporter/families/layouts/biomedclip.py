"""BiomedCLIP as open_clip publishes it: names of two other libraries, and a config that names theirs.

The layout is open_clip's state dict saved as safetensors, beside BiomedBERT's tokenizer.json and a
config.json that needs to say no more than ``"model_type": "biomedclip"``; open_clip_config.json is
compared where it lies beside them. Names stay open_clip's (``visual.trunk``, ``text.transformer``), so
adapters trained with open_clip fit as they are. Absent sizes are those of timm's
``vit_base_patch16_224`` and of BiomedBERT, and open_clip's own (hf_model.py, HFTextEncoder).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.families.config import count, section
from exporter.families.images.clip import MEAN, STD
from exporter.families.images.open_clip import PROCESSOR
from exporter.families.layouts.bert import POOLER

MODEL_TYPE, CLASS = "biomedclip", "BiomedCLIPModel"
CONFIG_FILE = "open_clip_config.json"
TEXT_PREFIX = "text.transformer."
LEFT_OUT = {"text.transformer.pooler": POOLER}
TRUNK, POOLING = "vit_base_patch16_224", "cls_last_hidden_state_pooler"
BERTS = tuple(
    f"microsoft/BiomedNLP-{name}-base-uncased-abstract" for name in ("BiomedBERT", "PubMedBERT")
)
VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT = {
    "model_type": "bert",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "context_length": 256,
}
IMAGES = {
    "image_processor_type": PROCESSOR,
    "resample": 3,
    "image_mean": list(MEAN),
    "image_std": list(STD),
}
# What open_clip's preprocess_cfg may say; absent keys are its defaults.
PREPROCESS = {
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "mode": "RGB",
}


def biomedclip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the published sizes where it says none. Raises `InputRefused` on a bad one."""
    parts = {key: config.get(key) or {} for key in ("vision_config", "text_config")}
    vision, text = (section(parts, key) for key in parts)
    merged = {**TEXT, **text}
    size = count(config, "projection_dim", 512, "config")
    # open_clip's rule: the mean of both widths, rounded down.
    inner = (count(merged, "hidden_size", 768, "text_config") + size) // 2
    return {
        **config,
        "architectures": [CLASS],
        "projection_dim": size,
        "text_projection_size": count(config, "text_projection_size", inner, "config"),
        "vision_config": {**VISION, **vision},
        "text_config": merged,
    }


def check_open_clip(folder: Path, config: Mapping[str, Any]) -> None:
    """Compare a folder's open_clip_config.json with what its config.json stands for here.

    Nothing when there is no such file. Raises `InputRefused` for another tower, pooling, projection,
    width or preparation of images.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    published, ours = read_json(path), biomedclip_config(config)
    model = section(published, "model_cfg")
    vision, text = section(model, "vision_cfg"), section(model, "text_cfg")
    found = {
        "embed_dim": (model.get("embed_dim"), (ours["projection_dim"],)),
        "timm_model_name": (vision.get("timm_model_name"), (TRUNK,)),
        # Either way the class token.
        "timm_pool": (vision.get("timm_pool", ""), ("", "token")),
        "timm_proj": (vision.get("timm_proj"), ("linear",)),
        "hf_model_name": (text.get("hf_model_name"), BERTS),
        # cls_pooler is BERT's own pooler in today's open_clip, which is not what was trained.
        "hf_pooler_type": (text.get("hf_pooler_type", text.get("pooler_type")), (POOLING,)),
        "hf_proj_type": (text.get("hf_proj_type", text.get("proj")), ("mlp",)),
        "context_length": (text.get("context_length"), (ours["text_config"]["context_length"],)),
    }
    images = published.get("preprocess_cfg") or {}
    found |= {key: (images.get(key, known), (known,)) for key, known in PREPROCESS.items()}
    for key, (value, expected) in found.items():
        if value not in expected:
            raise InputRefused(
                f"{path}: {key} is {value!r}; expected {' or '.join(map(repr, expected))}, as BiomedCLIP has "
                "it: another open_clip model needs a family of its own"
            )
