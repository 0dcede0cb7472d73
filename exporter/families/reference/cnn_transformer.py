"""The CNN-Transformer captioner in torch, for the build side: the reference that defines the network.

Its CNN has torchvision's names of DenseNet, its encoder and decoder are ``torch.nn``'s own layers, so
that checkpoints made of these load strictly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import gelu, linear, relu, scaled_dot_product_attention
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from exporter.families.captioners.cnn_transformer import DENSENET_121, MODEL_TYPE, tower_spec
from exporter.families.specs.densenet import DenseNetSpec

# Not the functions that torch's fused path for encoder layers looks for: it would pass by adapted ones.
ACTIVATIONS = {"relu": torch.relu, "gelu": partial(gelu, approximate="none")}


class CNNTransformerConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.captioners.cnn_transformer` reads, with the same defaults."""

    model_type = MODEL_TYPE
    image_size: int = 224
    growth_rate: int = 32
    block_config: list[int] | tuple[int, ...] = DENSENET_121
    num_init_features: int = 64
    bn_size: int = 4
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    encoder_layers: int = 3
    decoder_layers: int = 3
    vocab_size: int = 30522
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, inner: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input's channels with the layer's own behind them."""
        inner = self.conv1(relu(self.norm1(x)))
        return torch.cat([x, self.conv2(relu(self.norm2(inner)))], dim=1)


class _Transition(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


def _features(spec: DenseNetSpec) -> nn.Sequential:
    """Torchvision's ``densenet121().features``, for any sizes."""
    features = nn.Sequential()
    features.conv0 = nn.Conv2d(3, spec.first, 7, stride=2, padding=3, bias=False)
    features.norm0 = nn.BatchNorm2d(spec.first)
    features.relu0 = nn.ReLU()
    features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
    inner = spec.bottleneck * spec.growth
    for number, block in enumerate(spec.dense_blocks(), 1):
        layers = nn.Sequential()
        for i, layer in enumerate(block.layers, 1):
            setattr(layers, f"denselayer{i}", _DenseLayer(layer.inputs, inner, spec.growth))
        setattr(features, f"denseblock{number}", layers)
        if block.transition:
            setattr(features, f"transition{number}", _Transition(block.outputs))
    features.norm5 = nn.BatchNorm2d(spec.channels)
    return features


@dataclass
class CaptionCache:
    """A text being decoded: cross keys and values per layer, and the keys and values of its tokens."""

    cross: list[tuple[torch.Tensor, torch.Tensor]]
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    length: int = 0


class CNNTransformer(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its head. `forward` is torch's own decoder over the whole text; `append` computes
    the same with keys and values kept.
    """

    config_class = CNNTransformerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_tokens.weight"}
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"num_batches_tracked"]

    def __init__(self, config: CNNTransformerConfig) -> None:
        super().__init__(config)
        spec = tower_spec(config.to_dict())
        width = config.hidden_size
        self.cnn: Any = nn.Module()
        self.cnn.features = _features(spec.cnn)
        self.project = nn.Linear(spec.cnn.channels, width)
        self.cells = nn.Embedding(spec.rows, width)
        sizes: dict[str, Any] = {
            "d_model": width,
            "nhead": config.num_attention_heads,
            "dim_feedforward": config.intermediate_size,
            "dropout": 0.0,
            "activation": ACTIVATIONS[config.hidden_act],
            "batch_first": True,
        }
        encoder, decoder = nn.TransformerEncoderLayer(**sizes), nn.TransformerDecoderLayer(**sizes)
        self.encoder = nn.TransformerEncoder(
            encoder, config.encoder_layers, enable_nested_tensor=False
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.decoder = nn.TransformerDecoder(decoder, config.decoder_layers)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.use_cache = False

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rows ``[images, cells, hidden]`` of images ``[images, 3, side, side]``."""
        maps = relu(self.cnn.features(pixels))
        rows = self.project(maps.flatten(2).transpose(1, 2)) + self.cells.weight
        found: torch.Tensor = self.encoder(rows)
        return found

    def cross(self, memory: torch.Tensor) -> torch.Tensor:
        """Keys and values of every decoder layer, ``[images, cells, layers * 2 * hidden]``."""
        width, parts = memory.shape[-1], []
        for layer in self.decoder.layers:
            attention: Any = layer.multihead_attn
            weight, bias = attention.in_proj_weight[width:], attention.in_proj_bias[width:]
            parts.append(linear(memory, weight, bias))
        return torch.cat(parts, dim=-1)

    def start(self, cross: torch.Tensor) -> CaptionCache:
        """An empty text behind the keys and values ``[cells, layers * 2 * hidden]`` of an image."""
        parts = [self._heads(p) for p in cross.chunk(2 * len(self.decoder.layers), dim=-1)]
        return CaptionCache(list(zip(parts[::2], parts[1::2], strict=True)))

    def append(self, embeds: torch.Tensor, cache: CaptionCache) -> torch.Tensor:
        """Hidden states ``[length, hidden]`` of embeddings ``[length, hidden]`` behind `cache`."""
        first, count = cache.length, len(embeds)
        x = embeds + self.positions.weight[first : first + count]
        seen = torch.ones(count, first + count, dtype=torch.bool).tril(first)
        for number, layer in enumerate(self.decoder.layers):
            attention: Any = layer.self_attn
            parts = linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
            query, key, value = (self._heads(part) for part in parts)
            if number in cache.own:
                before = cache.own[number]
                key, value = (torch.cat(p, dim=1) for p in zip(before, (key, value), strict=True))
            cache.own[number] = (key, value)
            found = scaled_dot_product_attention(query, key, value, attn_mask=seen)
            x = layer.norm1(x + attention.out_proj(self._rows(found)))
            attention = layer.multihead_attn
            width = x.shape[-1]
            weight, bias = attention.in_proj_weight[:width], attention.in_proj_bias[:width]
            found = scaled_dot_product_attention(
                self._heads(linear(x, weight, bias)), *cache.cross[number]
            )
            x = layer.norm2(x + attention.out_proj(self._rows(found)))
            x = layer.norm3(x + layer.linear2(layer.activation(layer.linear1(x))))
        cache.length += count
        return x

    def _heads(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), self.config.num_attention_heads, -1).transpose(0, 1)

    @staticmethod
    def _rows(heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(0, 1).flatten(1)

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **_: Any
    ) -> CausalLMOutputWithPast:
        """Logits ``[images, length, vocab]`` of whole texts from their start."""
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.embed_tokens(input_ids) + self.positions.weight[:length]
        hidden = self.decoder(x, self.encode(pixel_values), tgt_mask=mask)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """The whole text again for every token: nothing is kept."""
        return {"input_ids": input_ids, "pixel_values": pixel_values}
