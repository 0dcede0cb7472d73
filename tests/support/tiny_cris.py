"""A tiny random CRIS as its code saves it, with CLIP's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny_clip import save_tensors, write_clip_tokenizer

SIDE, WORDS = 96, 12
SIZES: dict[str, Any] = {
    "input_size": SIDE,
    "clip_resolution": 64,
    "vision_width": 8,
    "vision_layers": [1, 2, 1, 1],
    "embed_dim": 40,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 4,
    "context_length": 20,
    "word_len": WORDS,
    "fpn_out": [16, 32, 48],
    "num_layers": 2,
    "num_head": 4,
    "dim_ffn": 64,
}


def write_tiny_cris(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a random model's folder under the names of a checkpoint of several GPUs.

    `changed` are keys of config.json. Statistics of batch norms are random too.
    """
    import torch

    from exporter.families.reference.cris import CRIS, CRISConfig

    folder.mkdir(parents=True, exist_ok=True)
    ids = write_clip_tokenizer(folder)
    config = {"model_type": "cris", **SIZES, "vocab_size": len(ids), **changed}
    settings = {k: v for k, v in config.items() if k != "model_type"}
    torch.manual_seed(seed)
    model = CRIS(CRISConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            found = 1 + 0.3 * noise.abs()
        elif value.ndim == 1 and name.endswith("weight"):
            found = 1 + 0.1 * noise
        elif value.ndim < 2:
            found = 0.1 * noise
        elif "embedding" in name:
            found = 0.5 * noise
        else:
            found = noise * (1.4 / value[0].numel() ** 0.5)
        tensors[f"module.{name}"] = found.half()
    save_tensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    side = config["input_size"]
    images = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": side, "width": side},
        "resample": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
