"""A tiny random CNN-Transformer captioner's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_ved import write_end_tokenizer

SIDE, CONTEXT = 64, 96
SIZES = {
    "image_size": SIDE,
    "growth_rate": 8,
    "block_config": [2, 3, 2],
    "num_init_features": 16,
    "bn_size": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "relu",
    "encoder_layers": 2,
    "decoder_layers": 3,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}


def write_tiny_cnn(folder: Path, *, seed: int = 0, dtype: str = "float16", **changed: Any) -> Path:
    """Write a random model with the names of the reference module, its tokenizer and its settings.

    `changed` are keys of config.json. Weights are larger than usual, so that greedy text varies; the
    statistics of the CNN's norms are those of no data.
    """
    import torch
    from safetensors.torch import save_file

    from exporter.families.reference.cnn_transformer import CNNTransformer, CNNTransformerConfig

    folder.mkdir(parents=True, exist_ok=True)
    end = write_end_tokenizer(folder, CONTEXT)
    config = {
        "architectures": ["CNNTransformer"],
        "model_type": "cnn_transformer",
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "vocab_size": end + 1,
        **SIZES,
        **changed,
    }
    torch.manual_seed(seed)
    model = CNNTransformer(CNNTransformerConfig.from_dict(config)).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            tensors[name] = value.clone()
            continue
        if "norm" in name:
            one = float(name.endswith((".weight", "running_var")))
            made = one + 0.1 * noise
        elif "conv" in name:
            made = noise / value[0].numel() ** 0.5
        elif name.startswith(("embed_tokens", "positions", "cells")):
            made = 1.5 * noise
        elif "multihead_attn.out_proj" in name:
            made = 0.05 * noise  # what an image adds is the same at all places: not the most of it
        else:
            made = (0.02 if name.endswith("bias") else 0.16) * noise
        tensors[name] = made.to(getattr(torch, dtype))
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    images = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    return folder
