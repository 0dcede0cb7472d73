"""A tiny random BiomedCLIP folder as open_clip publishes it, and an independent model of the same.

The reference consists of transformers' ViTModel and BertModel; its weights are written under the
names that open_clip's CustomTextCLIP has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tests.support.tiny_bert import bert_sizes, spread, write_wordpiece

SIDE, PATCH, WIDTH, EMBED, CONTEXT = 32, 8, 48, 40, 24
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


class PlainBiomedCLIP(nn.Module):
    """The same two encoders from transformers' classes."""

    def __init__(self, text: dict[str, Any], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        vision = ViTConfig(**VISION, layer_norm_eps=1e-6)
        self.vit = ViTModel(vision, add_pooling_layer=False)
        self.bert = BertModel(BertConfig(**text))
        inner = (text["hidden_size"] + EMBED) // 2
        self.head = nn.Linear(WIDTH, EMBED, bias=False)
        self.first = nn.Linear(text["hidden_size"], inner, bias=False)
        self.second = nn.Linear(inner, EMBED, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.eval()
        spread(self, seed)
        self.logit_scale.data.fill_(2.5)

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors of images."""
        found: torch.Tensor = self.head(self.vit(pixels).last_hidden_state[:, 0])
        return found

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors of texts."""
        first = self.bert(ids, mask).last_hidden_state[:, 0]
        found: torch.Tensor = self.second(nn.functional.gelu(self.first(first)))
        return found

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its weights by open_clip's names: one matrix for queries, keys and values."""
        own = self.state_dict()
        for name, values in own.items():
            if ".q_proj." in name:
                parts = [own[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
                yield (
                    _published(name.replace("attention.q_proj", "attention.qkv")),
                    torch.cat(parts),
                )
            elif ".k_proj." not in name and ".v_proj." not in name:
                yield _published(name), values


NAMES = (
    ("vit.embeddings.cls_token", "visual.trunk.cls_token"),
    ("vit.embeddings.position_embeddings", "visual.trunk.pos_embed"),
    ("vit.embeddings.patch_embeddings.projection", "visual.trunk.patch_embed.proj"),
    ("vit.layernorm", "visual.trunk.norm"),
    ("vit.layers", "visual.trunk.blocks"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    ("attention.qkv", "attn.qkv"),
    ("attention.o_proj", "attn.proj"),
    ("bert.", "text.transformer."),
    ("head.", "visual.head.proj."),
    ("first.", "text.proj.0."),
    ("second.", "text.proj.2."),
)


def _published(name: str) -> str:
    # BERT's own names have no counterpart of the tower's.
    pairs = NAMES[9:10] if name.startswith("bert.") else NAMES
    for new, old in pairs:
        name = name.replace(new, old)
    return name


def write_tiny_biomedclip(
    folder: Path, *, seed: int = 0, dtype: str = "float16", extras: bool = True, **changed: Any
) -> Path:
    """Write a random model's folder, with the sizes that open_clip does not say in config.json.

    `extras`: BERT's pooler and its position numbers, which some files carry. `changed` are keys of
    config.json.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = bert_sizes(write_wordpiece(folder, limit=512))
    model = PlainBiomedCLIP(text, seed)
    tensors = {n: t.to(getattr(torch, dtype)).contiguous() for n, t in model.published()}
    if extras:
        ids = torch.arange(text["max_position_embeddings"])[None]
        tensors["text.transformer.embeddings.position_ids"] = ids
    else:
        tensors = {n: t for n, t in tensors.items() if "pooler" not in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "biomedclip",
        "projection_dim": EMBED,
        "vision_config": VISION,
        "text_config": {**text, "context_length": CONTEXT},
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def plain_biomedclip(folder: Path, *, seed: int = 0) -> PlainBiomedCLIP:
    """The reference of a folder that `write_tiny_biomedclip` wrote with that `seed`."""
    config = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k != "context_length"}
    return PlainBiomedCLIP(text, seed)
