"""A tiny random MedCLIP folder with the tensors of the published code's state dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from tests.support.tiny_bert import bert_sizes, spread, write_wordpiece
from tests.support.tiny_medfilip import (
    CHANNELS,
    DEPTHS,
    FIRST,
    plain_resnet,
    published_resnet,
    spread_statistics,
)

SIDE, WINDOW, EMBED = 32, 4, 24
# Grids of 16, 8 and 4 cells: windows that are shifted, and one that fills its grid.
VISION = {
    "image_size": SIDE,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 4],
    "window_size": WINDOW,
    "mlp_ratio": 2.0,
}
RESNET = {
    "model_type": "resnet",
    "image_size": SIDE,
    "embedding_size": FIRST,
    "depths": list(DEPTHS),
}
LAYERS = 3
# Newest part of a Swin block's name to the one that transformers 4 and the published files have.
OLD = (
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("attention.relative_position_bias.", "attention.self."),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


class PlainMedCLIP(nn.Module):
    """The modules of the published code: Swin and BERT as AutoModel gives them, two projections."""

    def __init__(self, text: dict[str, Any], seed: int, *, resnet: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.swin = None if resnet else SwinModel(SwinConfig(**VISION))
        self.resnet = plain_resnet() if resnet else None
        self.bert = BertModel(BertConfig(**text))
        self.image_head = nn.Linear(CHANNELS if resnet else 64, EMBED, bias=False)
        self.text_head = nn.Linear(text["hidden_size"], EMBED, bias=False)
        self.eval()
        spread(self, seed)
        spread_statistics(self, seed)
        self.logit_scale = nn.Parameter(torch.tensor(5.0))

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors of images."""
        if self.swin is None:
            pooled = self.resnet(pixels).pooler_output.flatten(1)
        else:
            pooled = self.swin(pixels).last_hidden_state.mean(1)
        found: torch.Tensor = self.image_head(pooled)
        return found

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors of texts: mean over all places, then over the states 1, 2 and the last."""
        states = self.bert(ids, mask, output_hidden_states=True).hidden_states
        places = [states[i].mean(1) for i in (1, 2, len(states) - 1)]
        found: torch.Tensor = self.text_head(sum(places) / 3)
        return found

    def published(self) -> dict[str, torch.Tensor]:
        """Its state dict by the published names, with the buffers that were saved then."""
        found = {"logit_scale": self.logit_scale.data}
        if self.swin is None:
            found |= {f"vision_model.model.{n}": v for n, v in published_resnet(self.resnet)}
            found["vision_model.model.fc.weight"] = self.image_head.weight.data
        else:
            found |= self._published_swin()
        for name, values in self.bert.state_dict().items():
            found[f"text_model.model.{name}"] = values
        ids = torch.arange(self.bert.config.max_position_embeddings)[None]
        found["text_model.model.embeddings.position_ids"] = ids
        found["text_model.projection_head.weight"] = self.text_head.weight.data
        return found

    def _published_swin(self) -> dict[str, torch.Tensor]:
        found = {"vision_model.projection_head.weight": self.image_head.weight.data}
        for name, values in self.swin.state_dict().items():
            found[f"vision_model.model.{_old(name)}"] = values
        index = torch.zeros((WINDOW**2, WINDOW**2), dtype=torch.int64)
        for stage, depth in enumerate(VISION["depths"]):
            for block in range(depth):
                at = f"vision_model.model.encoder.layers.{stage}.blocks.{block}.attention.self."
                found[f"{at}relative_position_index"] = index.clone()
        return found


def _old(name: str) -> str:
    for new, old in OLD if ".blocks." in name else ():
        name = name.replace(new, old)
    return name


def write_tiny_medclip(
    folder: Path,
    *,
    seed: int = 0,
    resnet: bool = False,
    dtype: str = "float16",
    **changed: Any,
) -> Path:
    """Write a random model's folder, with the tower of either variant; `changed` are keys of
    config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = {**bert_sizes(write_wordpiece(folder)), "num_hidden_layers": LAYERS}
    kind = getattr(torch, dtype)
    tensors = {
        name: (values.to(kind) if values.is_floating_point() else values).contiguous()
        for name, values in PlainMedCLIP(text, seed, resnet=resnet).published().items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "medclip",
        "projection_dim": EMBED,
        "vision_config": RESNET if resnet else VISION,
        "text_config": text,
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def plain_medclip(folder: Path, *, seed: int = 0) -> PlainMedCLIP:
    """The reference of a folder that `write_tiny_medclip` wrote with that `seed`."""
    config = json.loads((folder / "config.json").read_text())
    resnet = config["vision_config"].get("model_type") == "resnet"
    return PlainMedCLIP(config["text_config"], seed, resnet=resnet)
