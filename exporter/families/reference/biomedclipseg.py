"""BiomedCLIPSeg in torch, for the build side: BiomedCLIP with transformers' own CLIPSegDecoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CLIPSegConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.clipseg.modeling_clipseg import CLIPSegDecoder

from exporter.families.reference.biomedclip import BiomedCLIPConfig, BiomedCLIPModel
from exporter.families.specs.biomedclipseg import (
    DECODER,
    DECODER_EPS,
    MODEL_TYPE,
    biomedclipseg_config,
    states_spec,
)


class BiomedCLIPSegConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.specs.biomedclipseg` reads."""

    model_type = MODEL_TYPE
    projection_dim: int = 512
    text_projection_size: int | None = None
    vision_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    extract_layers: list[int] | tuple[int, ...] = (3, 6, 9)
    reduce_dim: int = 64
    decoder_num_attention_heads: int = 4
    decoder_intermediate_size: int = 2048
    conditional_layer: int = 0
    use_complex_transposed_convolution: bool = True


class BiomedCLIPSeg(PreTrainedModel):  # type: ignore[misc]
    """The published module, with its parts under their names."""

    config_class = BiomedCLIPSegConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: BiomedCLIPSegConfig) -> None:
        super().__init__(config)
        settings = biomedclipseg_config(config.to_dict())
        spec = states_spec(settings)
        self.read = spec.read
        inner = {key: settings[key] for key in ("projection_dim", "text_projection_size")}
        halves = {key: settings[key] for key in ("vision_config", "text_config")}
        self.biomedclip = BiomedCLIPModel(BiomedCLIPConfig(**inner, **halves))
        tower = spec.image.tower
        vision = {
            "hidden_size": tower.hidden_size,
            "num_attention_heads": tower.heads,
            "patch_size": tower.patch_size,
            "layer_norm_eps": DECODER_EPS,
        }
        own = {key: settings[key] for key in DECODER}
        size = settings["projection_dim"]
        small = CLIPSegConfig(**own, projection_dim=size, vision_config=vision)
        small._attn_implementation = "sdpa"
        self.decoder = CLIPSegDecoder(small)
        self.post_init()

    def states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states ``[images, rows, hidden]`` behind the blocks that the decoder reads."""
        trunk = self.biomedclip.visual.trunk
        rows = trunk.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([trunk.cls_token.expand(len(rows), -1, -1), rows], dim=1) + trunk.pos_embed
        found = []
        for block in trunk.blocks:
            x = block(x)
            found.append(x)
        return [found[layer] for layer in self.read]

    def forward(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits ``[images, height, width]``: a text for each image."""
        texts = self.biomedclip.encode_text(input_ids, attention_mask)
        logits: torch.Tensor = self.decoder(self.states(pixel_values), texts).logits
        return logits
