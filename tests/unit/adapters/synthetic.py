"""Small checkpoints and adapters of random numbers, written without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]
EMBEDDING = "model.text_model.embed_tokens.weight"
Q = "model.text_model.layers.{}.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
}


def base_arrays(layers: int = 2, width: int = 8) -> Arrays:
    """Embedding, head, a norm, and one square matrix per layer."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> NDArray[np.float32]:
        return random.normal(0, 0.1, shape).astype(np.float32)

    arrays: Arrays = {EMBEDDING: matrix(12, width), "lm_head.weight": matrix(12, width)}
    arrays["model.text_model.norm.weight"] = np.ones(width, np.float32)
    for layer in range(layers):
        arrays[f"{Q.format(layer)}.weight"] = matrix(width, width)
    return arrays


def write_base(
    folder: Path, arrays: Arrays | None = None, config: dict[str, Any] | None = None
) -> Path:
    """A checkpoint folder; `config` is added to an Idefics3 config with a head of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base_arrays() if arrays is None else arrays, folder / "model.safetensors")
    found = {"model_type": "idefics3", "tie_word_embeddings": False} | (config or {})
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def lora_arrays(layers: int = 2, width: int = 8, rank: int = 2) -> Arrays:
    """A pair for the q_proj of each layer, with peft's prefix."""
    random = np.random.default_rng(1)
    arrays: Arrays = {}
    for layer in range(layers):
        stem = f"base_model.model.{Q.format(layer)}"
        arrays[f"{stem}.lora_A.weight"] = random.normal(size=(rank, width)).astype(np.float32)
        arrays[f"{stem}.lora_B.weight"] = random.normal(size=(width, rank)).astype(np.float32)
    return arrays


def write_lora(folder: Path, arrays: Arrays | None = None, **config: Any) -> Path:
    """An adapter folder; `config` changes `CONFIG`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_arrays() if arrays is None else arrays, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder
