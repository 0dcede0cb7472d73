"""The plug-in of `families.task_models.medbridge` over transformers' CLIPModel, for the build side: the reference
that defines the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPConfig, CLIPModel
from transformers.activations import ACT2FN

from exporter.families.base import VitSpec
from exporter.families.task_models.medbridge import MODEL_TYPE, BridgedImage, bridged_image


class MedBridgeConfig(CLIPConfig):  # type: ignore[misc]
    """CLIP's config.json with a ``bridge_config``."""

    model_type = MODEL_TYPE
    bridge_config: dict[str, Any] | None = None


class _Attention(nn.Module):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        size = spec.hidden_size
        self.q_proj, self.k_proj = nn.Linear(size, size), nn.Linear(size, size)
        self.v_proj, self.out_proj = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """What rows ``[batch, rows, hidden]`` find in `source` ``[batch, other rows, hidden]``."""
        parts = (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        heads = [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]
        found: torch.Tensor = self.out_proj(
            scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        )
        return found


class _Layer(nn.Module):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        size, inner = spec.hidden_size, spec.intermediate_size
        self.cross_attn_norm = nn.LayerNorm(size, eps=spec.norm_eps)
        self.self_attn_norm = nn.LayerNorm(size, eps=spec.norm_eps)
        self.mlp_norm = nn.LayerNorm(size, eps=spec.norm_eps)
        self.cross_attn, self.self_attn = _Attention(spec), _Attention(spec)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(size, inner), "fc2": nn.Linear(inner, size)})
        self.activation = ACT2FN[spec.activation]

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Queries ``[images, views, queries, hidden]`` look at their own view's `features` ``[images,
        views, rows, hidden]``, then at one another across the views.
        """
        images, views = x.shape[:2]
        seen = self.cross_attn(self.cross_attn_norm(x).flatten(0, 1), features.flatten(0, 1))
        x = x + seen.unflatten(0, (images, views))
        own = self.self_attn_norm(x).flatten(1, 2)
        x = x + self.self_attn(own, own).unflatten(1, (views, -1))
        wide = self.activation(self.mlp["fc1"](self.mlp_norm(x)))
        found: torch.Tensor = x + self.mlp["fc2"](wide)
        return found


class Bridge(nn.Module):
    """The plug-in: what is added to the class token of the whole view."""

    def __init__(self, spec: BridgedImage) -> None:
        super().__init__()
        block = spec.block
        self.queries = nn.Parameter(0.02 * torch.randn(spec.queries, block.hidden_size))
        self.features_norm = nn.LayerNorm(block.hidden_size, eps=block.norm_eps)
        self.layers = nn.ModuleList(_Layer(block) for _ in range(block.layers))
        self.final_norm = nn.LayerNorm(block.hidden_size, eps=block.norm_eps)
        self.projection = nn.Linear(block.hidden_size, block.hidden_size)
        # Before training the model is the frozen CLIP.
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``[images, hidden]`` from the tower's states ``[images, views, rows, hidden]``."""
        features = self.features_norm(states)
        x = self.queries.expand(*states.shape[:2], -1, -1)
        for layer in self.layers:
            x = layer(x, features)
        found: torch.Tensor = self.projection(self.final_norm(x).amax(dim=1).mean(dim=1))
        return found


class MedBridgeModel(CLIPModel):  # type: ignore[misc]
    """CLIPModel with the plug-in as ``bridge``; CLIP's own methods work as they do."""

    config_class = MedBridgeConfig

    def __init__(self, config: MedBridgeConfig) -> None:
        super().__init__(config)
        self.bridge = Bridge(bridged_image(config.to_dict()))

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vectors ``[images, projection_dim]`` of views ``[images, views, 3, side, side]``."""
        views = pixel_values.shape[:2]
        states = self.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        states = states.unflatten(0, views)
        summary = states[:, 0, 0] + self.bridge(states)
        found: torch.Tensor = self.visual_projection(self.vision_model.post_layernorm(summary))
        return found
