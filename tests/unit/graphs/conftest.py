"""Small random Idefics3 models of transformers, saved as folders, and how to run their graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

torch.set_num_threads(1)

TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}

Model = Idefics3ForConditionalGeneration


def make_model(
    text: dict[str, Any], vision: dict[str, Any], *, scale: int = 2, tied: bool = False
) -> Model:
    """Random weights, four times the usual spread, so that outputs do not degenerate."""
    torch.manual_seed(3)
    config = Idefics3Config(
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision},
        scale_factor=scale,
        image_token_id=100,
        tie_word_embeddings=tied,
    )
    model = Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    return model


def save(model: Model, folder: Path) -> Path:
    """A model folder as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    return folder


def session(model_dir: Path, name: str, level: str = "ENABLE_ALL") -> ort.InferenceSession:
    """One thread on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    path = model_dir / "onnx" / f"{name}.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Decoder:
    """The decoder graph with its embedding, past handed over by copying."""

    def __init__(self, model_dir: Path) -> None:
        self.embed = session(model_dir, "embed_tokens")
        self.decoder = session(model_dir, "decoder_model_merged")
        self.past_names = [
            i.name for i in self.decoder.get_inputs() if i.name.startswith("past_key_values")
        ]

    def empty(self, batch: int) -> list[np.ndarray]:
        shapes = {i.name: i.shape for i in self.decoder.get_inputs()}
        return [
            np.zeros((batch, shapes[n][1], 0, shapes[n][3]), np.float32) for n in self.past_names
        ]

    def run(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        past: list[np.ndarray] | None = None,
        keep: int = 0,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        past = self.empty(len(ids)) if past is None else past
        total = past[0].shape[2] + ids.shape[1]
        feed = {
            "inputs_embeds": self.embed.run(None, {"input_ids": ids})[0],
            "attention_mask": np.ones((len(ids), total), np.int64) if mask is None else mask,
            "num_logits_to_keep": np.array(keep, np.int64),
            **dict(zip(self.past_names, past, strict=True)),
        }
        logits, *present = self.decoder.run(None, feed)
        return logits, present


def text_logits(model: Model, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits of the torch model for text only."""
    with torch.no_grad():
        return (
            model(
                input_ids=torch.from_numpy(ids),
                attention_mask=None if mask is None else torch.from_numpy(mask),
            )
            .logits.float()
            .numpy()
        )


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the reference's largest absolute value."""
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


@pytest.fixture
def out(tmp_path: Path) -> Callable[[str], Path]:
    """Makes empty folders to export into."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return folder

    return make
