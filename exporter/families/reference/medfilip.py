"""MedFILIP in torch, for the build side: the published module over transformers' CLIP text model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedConfig, PreTrainedModel

from exporter.families.layouts.medfilip import MODEL_TYPE
from exporter.families.reference.resnet import ResNet
from exporter.families.task_models.medfilip import image_spec, text_spec


class MedFILIPConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.task_models.medfilip` reads."""

    model_type = MODEL_TYPE
    projection_dim: int = 768
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


class MedFILIPModel(PreTrainedModel):  # type: ignore[misc]
    """The published VLM with its ResNet, without normalising."""

    config_class = MedFILIPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"num_batches_tracked"]

    def __init__(self, config: MedFILIPConfig) -> None:
        super().__init__(config)
        settings = config.to_dict()
        image, text = image_spec(settings), text_spec(settings)
        self.image_model = ResNet(image)
        self.text_model = CLIPTextModel(CLIPTextConfig.from_dict(dict(config.text_config or {})))
        self.text_projection = nn.Linear(text.hidden_size, text.output_size, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Vectors ``[texts, projection_dim]``, not normalised."""
        pooled = self.text_model(input_ids, attention_mask).pooler_output
        found: torch.Tensor = self.text_projection(pooled)
        return found
