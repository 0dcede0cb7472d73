"""A small checkpoint of the architecture, written without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.core.tensors import SafetensorsWriter

TEXT, VISION = "model.text_model.", "model.vision_model."
CONFIG = {
    "model_type": "idefics3",
    "scale_factor": 2,
    "image_token_id": 5,
    "tie_word_embeddings": False,
    "text_config": {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 130,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
    },
    "vision_config": {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    },
}


def shapes(hidden: int = 96) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the architecture's modules give them, spelled out here once more."""
    found: dict[str, tuple[int, ...]] = {TEXT + "embed_tokens.weight": (130, hidden)}
    for i in range(2):
        layer = f"{TEXT}layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (96, hidden),
            "self_attn.k_proj": (32, hidden),
            "self_attn.v_proj": (32, hidden),
            "self_attn.o_proj": (hidden, 96),
            "mlp.gate_proj": (160, hidden),
            "mlp.up_proj": (160, hidden),
            "mlp.down_proj": (hidden, 160),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            found[f"{layer}{name}.weight"] = shape
    found[TEXT + "norm.weight"] = (hidden,)
    found["lm_head.weight"] = (130, hidden)
    found[VISION + "embeddings.patch_embedding.weight"] = (48, 3, 8, 8)
    found[VISION + "embeddings.patch_embedding.bias"] = (48,)
    found[VISION + "embeddings.position_embedding.weight"] = (16, 48)
    layer = VISION + "encoder.layers.0."
    linears = {f"self_attn.{n}_proj": (48, 48) for n in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (100, 48), "mlp.fc2": (48, 100)}
    for name, shape in linears.items():
        found[f"{layer}{name}.weight"] = shape
        found[f"{layer}{name}.bias"] = shape[:1]
    for name in (layer + "layer_norm1", layer + "layer_norm2", VISION + "post_layernorm"):
        found[name + ".weight"] = found[name + ".bias"] = (48,)
    found["model.connector.modality_projection.proj.weight"] = (hidden, 192)
    return found


def values(names: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float16]]:
    rng = np.random.default_rng(11)
    return {n: (0.05 * rng.standard_t(5, s)).astype(np.float16) for n, s in names.items()}


Writer = Callable[..., Path]


@pytest.fixture
def write_model(tmp_path: Path) -> Writer:
    """Write a model folder; `change` edits the tensors, `config` overrides top-level keys."""

    def write(
        change: Callable[[dict[str, NDArray[Any]]], None] | None = None, **config: Any
    ) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        tensors: dict[str, NDArray[Any]] = dict(values(shapes()))
        if change:
            change(tensors)
        codes = {"float16": "F16", "float32": "F32", "int64": "I64"}
        entries = {n: (codes[t.dtype.name], t.shape) for n, t in tensors.items()}
        with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (folder / "config.json").write_text(json.dumps(CONFIG | config))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return write
