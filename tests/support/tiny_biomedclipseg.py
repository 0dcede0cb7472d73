"""A tiny random BiomedCLIPSeg as its code saves it, and an independent model of the same.

The reference consists of transformers' ViTModel, BertModel and CLIPSegDecoder; its weights are written
under the names of the published module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertModel, CLIPSegConfig, ViTConfig, ViTModel
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

from exporter.families.base import Feed
from tests.support.tiny_bert import bert_sizes, spread, write_wordpiece
from tests.support.tiny_biomedclip import NAMES

SIDE, PATCH, EMBED, CONTEXT = 64, 16, 40, 24
EXTRACT = [0, 2, 3]
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
DECODER = {
    "extract_layers": EXTRACT,
    "reduce_dim": 32,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
    "conditional_layer": 0,
    "use_complex_transposed_convolution": True,
}


class PlainBiomedCLIPSeg(nn.Module):
    """The published module's arithmetic over transformers' classes."""

    def __init__(self, text: dict[str, Any], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vit = ViTModel(ViTConfig(**VISION, layer_norm_eps=1e-6), add_pooling_layer=False)
        self.bert = BertModel(BertConfig(**text))
        inner = (text["hidden_size"] + EMBED) // 2
        self.head = nn.Linear(VISION["hidden_size"], EMBED, bias=False)
        self.first = nn.Linear(text["hidden_size"], inner, bias=False)
        self.second = nn.Linear(inner, EMBED, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        vision = {"hidden_size": VISION["hidden_size"], "patch_size": PATCH}
        config = CLIPSegConfig(**DECODER, projection_dim=EMBED, vision_config=vision)
        self.decoder = CLIPSegDecoder(config)
        self.eval()
        spread(self, seed)

    def states(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """What the decoder reads: the code's list has no states before the first block."""
        hidden = self.vit(pixels, output_hidden_states=True).hidden_states[1:]
        return [hidden[i + 1] for i in EXTRACT]

    def text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors of texts."""
        first = self.bert(ids, mask).last_hidden_state[:, 0]
        found: torch.Tensor = self.second(nn.functional.gelu(self.first(first)))
        return found

    def published(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Its weights by the module's names: one matrix for queries, keys and values of an image."""
        own = self.state_dict()
        for name, values in own.items():
            if name.startswith("decoder."):
                yield f"net.{name}", values
            elif name.startswith("vit.") and ".q_proj." in name:
                parts = [own[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
                yield (
                    _published(name.replace("attention.q_proj", "attention.qkv")),
                    torch.cat(parts),
                )
            elif not (name.startswith("vit.") and (".k_proj." in name or ".v_proj." in name)):
                yield _published(name), values


def _published(name: str) -> str:
    pairs = [p for p in NAMES if p[0] == "bert."] if name.startswith("bert.") else NAMES
    for new, old in pairs:
        name = name.replace(new, old)
    return f"net.biomedclip.{name}"


def write_tiny_biomedclipseg(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """Write a random model's folder under the names of a training run's checkpoint.

    `changed` are keys of config.json, which says the sizes alone. The image settings are those that
    merging writes, at a smaller size.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = bert_sizes(write_wordpiece(folder, limit=512))
    model = PlainBiomedCLIPSeg(text, seed)
    tensors = {n: t.half().contiguous() for n, t in model.published() if "pooler" not in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "biomedclipseg",
        "projection_dim": EMBED,
        "vision_config": VISION,
        "text_config": {**text, "context_length": CONTEXT},
        **DECODER,
        **changed,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def plain_outputs(
    folder: Path, *, seed: int = 0
) -> Callable[[str, Feed], Mapping[str, NDArray[Any]]]:
    """The reference's outputs by graph, for a folder that was written with that `seed`."""
    config = json.loads((folder / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k != "context_length"}
    model = PlainBiomedCLIPSeg(text, seed)
    model.half().float()

    def outputs(graph: str, feed: Feed) -> Mapping[str, NDArray[Any]]:
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        with torch.inference_mode():
            if graph == "vision_model":
                states = model.states(given["pixel_values"])
                return {f"activations.{i}": part.numpy() for i, part in enumerate(states)}
            if graph == "text_model":
                embeds = model.text(given["input_ids"], given["attention_mask"])
                return {"text_embeds": embeds.numpy()}
            texts = given["text_embeds"]
            states = [given[f"activations.{i}"].repeat(len(texts), 1, 1) for i in range(3)]
            return {"logits": model.decoder(states, texts).logits.numpy()}

    return outputs
