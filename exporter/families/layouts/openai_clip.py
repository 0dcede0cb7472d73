"""CLIP as the original code keeps it (github.com/openai/CLIP, model.py), which CheXzero's is.

CheXzero publishes state dicts as pickles, which are not opened here. The layout is such a state dict
saved as safetensors, beside CLIP's tokenizer.json and a config.json that needs to say no more than
``"model_type": "chexzero"``: all sizes follow from the tensors' shapes, as the original `build_model`
takes them (its attention heads are 64 wide).

Beside other names it has one matrix for queries, keys and values, cut here into three, and the two
projections stored as ``[inputs, outputs]``, turned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.config import section
from exporter.families.layouts.joined import Joined
from exporter.families.specs.clip import LEGACY_END

CHEXZERO = "chexzero"
MODEL_TYPE, CLASS = "clip", "CLIPModel"
HEAD_SIZE = 64
VISION, TEXT = "visual.transformer.resblocks.*", "transformer.resblocks.*"
BLOCK = (
    ("attn", "self_attn"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
NAMES = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1", "vision_model.embeddings.patch_embedding"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("ln_final", "text_model.final_layer_norm"),
    *((f"{VISION}.{old}", f"vision_model.encoder.layers.*.{new}") for old, new in BLOCK),
    *((f"{TEXT}.{old}", f"text_model.encoder.layers.*.{new}") for old, new in BLOCK),
)
# Endings of "attn" before the renaming and of "self_attn" behind it.
CUTS = tuple(
    Joined(f"attn.in_proj_{kind}", tuple(f"attn.{part}_proj.{kind}" for part in "qkv"))
    for kind in ("weight", "bias")
)
TURNED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def openai_clip_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keys of CLIPConfig from the shapes of the tensors under their published names.

    Raises `InputRefused` when they are not those of a CLIP with a vision transformer.
    """
    try:
        width, channels, patch, other = shapes["visual.conv1.weight"]
        places = shapes["visual.positional_embedding"][0]
        context, text_width = shapes["positional_embedding"]
        vocabulary = shapes["token_embedding.weight"][0]
        embeds = shapes["text_projection"][1]
        inner = [shapes[f"{at}.0.mlp.c_fc.weight"][0] for at in (VISION[:-2], TEXT[:-2])]
    except (KeyError, ValueError, IndexError) as error:
        raise InputRefused(
            f"the weights are not the original CLIP code's with a vision transformer ({error!r}); expected "
            "its names, such as 'visual.conv1.weight', saved as safetensors"
        ) from error
    side = math.isqrt(places - 1)
    if side**2 != places - 1 or channels != 3 or patch != other or patch < 1:
        raise InputRefused(
            f"visual.conv1.weight is {[width, channels, patch, other]} for {places} positions; expected 3 "
            "channels, square patches and a square of them behind the class token"
        )
    layers = [
        sum(name.startswith(at) and name.endswith(".attn.in_proj_weight") for name in shapes)
        for at in (VISION[:-1], TEXT[:-1])
    ]
    vision, text = (
        _sizes(*found) for found in zip((width, text_width), inner, layers, strict=True)
    )
    return {
        "projection_dim": embeds,
        "vision_config": {**vision, "image_size": side * patch, "patch_size": patch},
        "text_config": {
            **text,
            "vocab_size": vocabulary,
            "max_position_embeddings": context,
        },
    }


def openai_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """CLIPConfig of a config.json to which the sizes were added. Raises `InputRefused` without them."""
    if not {"vision_config", "text_config", "projection_dim"} <= config.keys():
        raise InputRefused(
            f"config.json: model_type {config.get('model_type')!r} has no sizes, which follow from the "
            "weights; expected the folder with them, or what merging it wrote"
        )
    dtype = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    fixed = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    vision = {**fixed, **section(config, "vision_config"), "model_type": "clip_vision_model"}
    # The original code takes the state at the highest id, as transformers does for this end token.
    text = {**fixed, **section(config, "text_config"), "eos_token_id": LEGACY_END}
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "projection_dim": config["projection_dim"],
        "vision_config": {**vision, "projection_dim": config["projection_dim"]},
        "text_config": {
            **text,
            "model_type": "clip_text_model",
            "projection_dim": config["projection_dim"],
        },
        **dtype,
    }


def _sizes(width: int, inner: int, layers: int) -> dict[str, int]:
    if width % HEAD_SIZE:
        raise InputRefused(
            f"the weights have {width} channels; expected heads of {HEAD_SIZE}, as the original CLIP code"
        )
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": width // HEAD_SIZE,
    }
