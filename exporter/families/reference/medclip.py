"""MedCLIP in torch, for the build side: the published modules over transformers' Swin and BERT."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
)

from exporter.families.layouts.medclip import MODEL_TYPE
from exporter.families.reference.resnet import ResNet
from exporter.families.specs.resnet import ResNetImage
from exporter.families.task_models.medclip import SCALE_LIMITS, image_spec, text_spec


class MedCLIPConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.task_models.medclip` reads."""

    model_type = MODEL_TYPE
    projection_dim: int = 512
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


class MedCLIPModel(PreTrainedModel):  # type: ignore[misc]
    """MedCLIPModel with either of its image towers, without normalising."""

    config_class = MedCLIPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"num_batches_tracked"]

    def __init__(self, config: MedCLIPConfig) -> None:
        super().__init__(config)
        settings = config.to_dict()
        image, text = image_spec(settings), text_spec(settings)
        self.vision_model: Any = nn.Module()
        size = image.output_size
        if isinstance(image, ResNetImage):
            self.vision_model.model = ResNet(image)
        else:
            swin = SwinConfig.from_dict(dict(config.vision_config or {}))
            self.vision_model.model = SwinModel(swin)
            self.vision_model.projection_head = nn.Linear(image.tower.output_size, size, bias=False)
        self.whole = isinstance(image, ResNetImage)
        self.text_model: Any = nn.Module()
        bert = BertConfig.from_dict(dict(config.text_config or {}))
        self.text_model.model = BertModel(bert, add_pooling_layer=False)
        self.text_model.projection_head = nn.Linear(text.bert.hidden_size, size, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Vectors ``[images, projection_dim]`` of ``[images, 3, side, side]``."""
        states = self.vision_model.model(pixel_values)
        # A ResNet's last layer is the projection.
        found: torch.Tensor = (
            states if self.whole else self.vision_model.projection_head(states.pooler_output)
        )
        return found

    def encode_text(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Vectors ``[texts, projection_dim]``; padding counts among the places that are averaged."""
        found = self.text_model.model(input_ids, attention_mask, output_hidden_states=True)
        states = torch.stack([found.hidden_states[i] for i in (1, 2, -1)])
        vectors: torch.Tensor = self.text_model.projection_head(states.mean(dim=(0, 2)))
        return vectors

    def temperature(self) -> torch.Tensor:
        """What similarities are multiplied with."""
        return self.logit_scale.detach().clamp(*SCALE_LIMITS).exp()
