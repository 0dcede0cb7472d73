"""A tiny random CLIPSeg folder, laid out as the published one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_clip import (
    CONTEXT,
    END,
    START,
    random_values,
    save_tensors,
    write_clip_tokenizer,
)

# Images are larger than the tower's own, so that positions are interpolated, as in the published one.
SIDE, PATCH, TOWER, PROJECTION, REDUCED = 64, 16, 48, 40, 32


def write_tiny_clipseg(
    folder: Path,
    *,
    seed: int = 0,
    legacy: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write a random model, its tokenizer and its settings, and return `folder`.

    `legacy`: eos_token_id is 2, as published; else the tokenizer's own. `vision`, `text` and `top`
    change keys of config.json. Weights are about four times as large as usual.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    ids = write_clip_tokenizer(folder)
    config = _config(ids, legacy, vision or {}, text or {}, top)
    settings = {k: v for k, v in config.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = transformers.CLIPSegForImageSegmentation(transformers.CLIPSegConfig(**settings))
    values = random_values(model, seed)
    save_tensors(folder, {name: value.half() for name, value in values.items()})
    _dump(folder / "config.json", config)
    _dump(folder / "preprocessor_config.json", image_settings())
    return folder


def _config(
    ids: dict[str, int],
    legacy: bool,
    vision: dict[str, Any],
    text: dict[str, Any],
    top: dict[str, Any],
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPSegForImageSegmentation"],
        "model_type": "clipseg",
        "conditional_layer": 0,
        "decoder_hidden_act": "quick_gelu",
        "decoder_intermediate_size": 96,
        "decoder_num_attention_heads": 4,
        "extract_layers": [0, 2, 3],
        "projection_dim": PROJECTION,
        "reduce_dim": REDUCED,
        "use_complex_transposed_convolution": True,
        "torch_dtype": "float16",
        "text_config": {
            "model_type": "clipseg_text_model",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": len(ids),
            "max_position_embeddings": CONTEXT,
            "bos_token_id": 0 if legacy else ids[START],
            "eos_token_id": 2 if legacy else ids[END],
            "pad_token_id": 1,
            **text,
        },
        "vision_config": {
            "model_type": "clipseg_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": TOWER,
            "patch_size": PATCH,
            **vision,
        },
        **top,
    }


def image_settings() -> dict[str, Any]:
    """preprocessor_config.json in the form of the published one."""
    return {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": SIDE,
    }


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
