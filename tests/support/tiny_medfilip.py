"""A tiny random MedFILIP folder with the tensors of the published code's state dict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, ResNetConfig, ResNetModel

from tests.support.tiny_bert import spread
from tests.support.tiny_clip import CONTEXT, write_clip_tokenizer

SIDE, FIRST, DEPTHS, EMBED = 48, 8, (2, 1), 40
CHANNELS = 4 * FIRST << (len(DEPTHS) - 1)
VISION = {"image_size": SIDE, "embedding_size": FIRST, "depths": list(DEPTHS)}
IMAGES = {"image_processor_type": "MedFILIPImageProcessor", "image_mean": 0.47, "image_std": 0.3}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 2,
}
# transformers' names of a ResNet's parts to torchvision's.
NAMES = (
    (r"embedder\.embedder\.convolution", "conv1"),
    (r"embedder\.embedder\.normalization", "bn1"),
    (r"encoder\.stages\.(\d+)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
    (r"shortcut\.convolution", "downsample.0"),
    (r"shortcut\.normalization", "downsample.1"),
    (r"layer\.(\d)\.convolution", lambda found: f"conv{int(found[1]) + 1}"),
    (r"layer\.(\d)\.normalization", lambda found: f"bn{int(found[1]) + 1}"),
)


def plain_resnet() -> Any:
    """transformers' own ResNet, of the form of torchvision's."""
    sizes = [4 * FIRST << stage for stage in range(len(DEPTHS))]
    return ResNetModel(ResNetConfig(embedding_size=FIRST, hidden_sizes=sizes, depths=list(DEPTHS)))


def spread_statistics(model: nn.Module, seed: int) -> None:
    """Means and variances of batch norms that are those of no data, at half precision."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            noise = torch.randn(buffer.shape, generator=generator)
            start = float(name.endswith("var"))
            buffer.copy_((start + 0.1 * noise).half().float())


def published_resnet(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict of transformers' ResNet by torchvision's names."""
    for name, values in model.state_dict().items():
        new = name
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        yield new, values


class PlainMedFILIP(nn.Module):
    """The published module with transformers' ResNet in the place of torchvision's."""

    def __init__(self, words: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.resnet = plain_resnet()
        self.fc = nn.Linear(CHANNELS, EMBED)
        self.clip = CLIPTextModel(CLIPTextConfig(vocab_size=words, **TEXT))
        self.projection = nn.Linear(TEXT["hidden_size"], EMBED, bias=False)
        self.eval()
        spread(self, seed)
        spread_statistics(self, seed)
        self.logit_scale = nn.Parameter(torch.tensor(2.625))

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vectors of images."""
        found: torch.Tensor = self.fc(self.resnet(pixels).pooler_output.flatten(1))
        return found

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors of texts; as published, without a mask: what follows the end is not seen."""
        found: torch.Tensor = self.projection(self.clip(ids).pooler_output)
        return found

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its state dict by the published names."""
        for name, values in published_resnet(self.resnet):
            yield f"image_model.{name}", values
        for part in ("weight", "bias"):
            yield f"image_model.fc.{part}", getattr(self.fc, part).data
        for name, values in self.clip.state_dict().items():
            yield f"text_model.{name.removeprefix('text_model.')}", values
        yield "text_model.embeddings.position_ids", torch.arange(CONTEXT)[None]
        yield "text_projection.weight", self.projection.weight.data
        yield "logit_scale", self.logit_scale.data


def write_tiny_medfilip(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a random model's folder; `changed` are keys of config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    words = len(write_clip_tokenizer(folder))
    tensors = {
        name: (values.half() if values.is_floating_point() else values).contiguous()
        for name, values in PlainMedFILIP(words, seed).published()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "medfilip",
        "projection_dim": EMBED,
        "vision_config": VISION,
        "text_config": {**TEXT, "vocab_size": words},
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2))
    return folder


def plain_medfilip(folder: Path, *, seed: int = 0) -> PlainMedFILIP:
    """The reference of a folder that `write_tiny_medfilip` wrote with that `seed`."""
    config = json.loads((folder / "config.json").read_text())
    return PlainMedFILIP(config["text_config"]["vocab_size"], seed)
