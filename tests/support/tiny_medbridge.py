"""A tiny random CLIP with a plug-in of MedBridge's kind, and a plain model of the same arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from exporter.families.task_models.medbridge import join_plugin
from tests.support.task_inputs import SIZES, TEXTS, noise
from tests.support.tiny_clip import random_values, save_tensors, write_tiny_clip

Arrays = Mapping[str, NDArray[Any]]
BRIDGE = {
    "grid": 2,
    "overlap": 0.25,
    "num_queries": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


def write_tiny_medbridge(folder: Path, *, seed: int = 0, **bridge: Any) -> Path:
    """Write a random model's folder as `join_plugin` makes it of a CLIP and a plug-in's file.

    `bridge` changes keys of config.json's bridge_config.
    """
    settings = {**BRIDGE, **bridge}
    clip = write_tiny_clip(folder.parent / f"{folder.name}-clip", seed=seed)
    plugin = write_plugin(folder.parent / f"{folder.name}-plugin", clip, settings, seed=seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    join_plugin(clip, plugin, settings, folder)
    return folder


def write_plugin(folder: Path, clip: Path, bridge: Mapping[str, Any], *, seed: int) -> Path:
    """Write random tensors of a plug-in over the CLIP folder `clip`, and return their file."""
    from exporter.families.reference.medbridge import MedBridgeConfig, MedBridgeModel

    settings = json.loads((clip / "config.json").read_text())
    kept = {k: v for k, v in settings.items() if k not in ("model_type", "torch_dtype")}
    with torch.device("meta"):
        model = MedBridgeModel(MedBridgeConfig(**kept, bridge_config=dict(bridge)))
    values = random_values(model.bridge, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, {f"bridge.{name}": value.half() for name, value in values.items()})
    return folder / "model.safetensors"


class PlainBridge:
    """The plug-in from ``torch.nn.MultiheadAttention``: all views' queries and rows in one sequence, and
    a mask that lets a query see its own view alone.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], bridge: Mapping[str, Any]) -> None:
        self.state, self.bridge = state, bridge

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """What is added to each image's class token, from ``[images, views, rows, hidden]``."""
        images, views, rows, _ = states.shape
        count = self.bridge["num_queries"]
        features = self.norm("features_norm", states).flatten(1, 2)
        x = self.state["bridge.queries"].repeat(images, views, 1)
        other = torch.arange(views * count)[:, None] // count != torch.arange(views * rows) // rows
        for layer in range(self.bridge["num_hidden_layers"]):
            at = f"layers.{layer}."
            normed = self.norm(f"{at}cross_attn_norm", x)
            x = x + self.attention(f"{at}cross_attn.", normed, features, other)
            normed = self.norm(f"{at}self_attn_norm", x)
            x = x + self.attention(f"{at}self_attn.", normed, normed, None)
            wide = self.linear(f"{at}mlp.fc1", self.norm(f"{at}mlp_norm", x))
            x = x + self.linear(f"{at}mlp.fc2", wide * torch.sigmoid(1.702 * wide))
        final = self.norm("final_norm", x).reshape(images, views, count, -1)
        return self.linear("projection", final.max(dim=1).values.mean(dim=1))

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A linear layer of the plug-in."""
        weight, bias = (self.state[f"bridge.{name}.{part}"] for part in ("weight", "bias"))
        return x @ weight.T + bias

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A layer norm of the plug-in."""
        weight, bias = (self.state[f"bridge.{name}.{part}"] for part in ("weight", "bias"))
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def attention(
        self, at: str, x: torch.Tensor, source: torch.Tensor, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """torch's own layer; `hidden` is true where a row may not look."""
        layer = nn.MultiheadAttention(
            x.shape[-1], self.bridge["num_attention_heads"], batch_first=True
        )
        for part in ("weight", "bias"):
            found = [self.state[f"bridge.{at}{n}_proj.{part}"] for n in "qkv"]
            setattr(layer, f"in_proj_{part}", nn.Parameter(torch.cat(found)))
            out = self.state[f"bridge.{at}out_proj.{part}"]
            setattr(layer.out_proj, part, nn.Parameter(out))
        return layer(x, source, source, attn_mask=hidden, need_weights=False)[0]


def medbridge_outputs(folder: Path) -> Callable[[str, Arrays], Arrays]:
    """Outputs of transformers' CLIPModel over the frozen tensors, with `PlainBridge` in between."""
    from safetensors.torch import load_file
    from transformers import CLIPConfig, CLIPModel

    config = json.loads((folder / "config.json").read_text())
    bridge = config.pop("bridge_config")
    kept = {
        k: v for k, v in config.items() if k not in ("model_type", "torch_dtype", "architectures")
    }
    state = {n: v.float() for n, v in load_file(folder / "model.safetensors").items()}
    frozen = CLIPModel(CLIPConfig(**kept)).eval()
    frozen.load_state_dict({n: v for n, v in state.items() if not n.startswith("bridge.")})
    plain, tower = PlainBridge(state, bridge), frozen.vision_model

    def outputs(graph: str, feed: Arrays) -> Arrays:
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array) for name, array in feed.items()}
            if graph == "text_model":
                embeds = frozen.get_text_features(**inputs).pooler_output
                scale = frozen.logit_scale.detach().exp()
                return {"text_embeds": embeds.numpy(), "logit_scale": scale.numpy()}
            each = [tower(views).last_hidden_state for views in inputs["pixel_values"]]
            states = torch.stack(each)
            summary = tower.post_layernorm(states[:, 0, 0] + plain(states))
            return {"image_embeds": frozen.visual_projection(summary).numpy()}

    return outputs


def focal_processor(folder: Path, preparer: Any) -> Iterator[tuple[Arrays, Arrays]]:
    """The preparer of `BRIDGE`'s windows against transformers' image processor on crops: squares of
    4/7 of the middle square's edge, which begin at its start and after 3/7 of it.
    """
    from transformers import AutoTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        picture, square = noise(*size), min(size)
        left, top = (Fraction(n - square, 2) for n in size)
        starts, edge = (Fraction(0), Fraction(3 * square, 7)), Fraction(4 * square, 7)
        views = [picture]
        for y in starts:
            for x in starts:
                box = (left + x, top + y, left + x + edge, top + y + edge)
                views.append(picture.crop(tuple(map(round, box))))
        theirs = images([view.convert("RGB") for view in views], return_tensors="np")
        yield preparer.images([picture]), {"pixel_values": theirs["pixel_values"][None]}
    found = AutoTokenizer.from_pretrained(folder)(
        list(TEXTS), padding=True, truncation=True, max_length=24, return_tensors="np"
    )
    yield preparer.texts(TEXTS), dict(found)
