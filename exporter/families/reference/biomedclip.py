"""BiomedCLIP in torch, for the build side: the names of timm and open_clip over transformers' BERT."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel

from exporter.families.layouts.biomedclip import MODEL_TYPE
from exporter.families.specs.timm_vit import TimmImage
from exporter.families.task_models.biomedclip import image_spec, text_spec


class BiomedCLIPConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.task_models.biomedclip` reads."""

    model_type = MODEL_TYPE
    projection_dim: int = 512
    text_projection_size: int | None = None
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of all rows to all."""
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = scaled_dot_product_attention(*parts.unbind())
        seen: torch.Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return seen


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two layers with a GELU between them."""
        found: torch.Tensor = self.fc2(gelu(self.fc1(x)))
        return found


class _Block(nn.Module):
    def __init__(self, spec: TimmImage) -> None:
        super().__init__()
        width, eps = spec.tower.hidden_size, spec.tower.norm_eps
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = _Attention(width, spec.tower.heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = _Mlp(width, spec.tower.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and MLP, each behind its norm and added."""
        x = x + self.attn(self.norm1(x))
        found: torch.Tensor = x + self.mlp(self.norm2(x))
        return found


class _Trunk(nn.Module):
    def __init__(self, spec: TimmImage) -> None:
        super().__init__()
        tower = spec.tower
        width, side = tower.hidden_size, tower.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.rows, width))
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, side, stride=side)
        self.blocks = nn.ModuleList(_Block(spec) for _ in range(tower.layers))
        self.norm = nn.LayerNorm(width, tower.norm_eps)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The class token's row behind the last norm, ``[images, hidden]``."""
        rows = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(rows), -1, -1), rows], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.norm(x)[:, 0]
        return found


class BiomedCLIPModel(PreTrainedModel):  # type: ignore[misc]
    """open_clip's CustomTextCLIP with a linear image head and CLS pooling of texts."""

    config_class = BiomedCLIPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: BiomedCLIPConfig) -> None:
        super().__init__(config)
        settings = config.to_dict()
        image, text = image_spec(settings), text_spec(settings)
        self.visual: Any = nn.Module()
        self.visual.trunk = _Trunk(image)
        self.visual.head = nn.Module()
        self.visual.head.proj = nn.Linear(image.tower.hidden_size, image.output_size, bias=False)
        (_, inner), (_, size) = text.projections
        bert = BertConfig.from_dict(dict(config.text_config or {}))
        self.text: Any = nn.Module()
        self.text.transformer = BertModel(bert, add_pooling_layer=False)
        self.text.proj = nn.Sequential(
            nn.Linear(text.bert.hidden_size, inner, bias=False),
            nn.GELU(),
            nn.Linear(inner, size, bias=False),
        )
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vectors ``[images, projection_dim]``, not normalised."""
        found: torch.Tensor = self.visual.head.proj(self.visual.trunk(pixel_values))
        return found

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Vectors ``[texts, projection_dim]``, not normalised."""
        states = self.text.transformer(input_ids, attention_mask).last_hidden_state
        found: torch.Tensor = self.text.proj(states[:, 0])
        return found
