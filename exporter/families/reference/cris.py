"""CRIS in torch, for the build side: the published network with its names, over torch's own layers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, relu, scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedModel

from exporter.families.specs.cris import (
    LAYERS,
    MODEL_TYPE,
    TAPS,
    Bottleneck,
    Convolved,
    CrisImage,
    CrisMask,
    CrisSizes,
    cris_sizes,
)


class CRISConfig(PreTrainedConfig):  # type: ignore[misc]
    """The keys of config.json that `families.specs.cris` reads, with the same defaults."""

    model_type = MODEL_TYPE
    input_size: int = 416
    clip_resolution: int = 224
    vision_width: int = 64
    vision_layers: list[int] | tuple[int, ...] = LAYERS
    embed_dim: int = 1024
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    vocab_size: int = 49408
    context_length: int = 77
    word_len: int = 17
    fpn_out: list[int] | tuple[int, ...] = (256, 512, 1024)
    num_layers: int = 3
    num_head: int = 8
    dim_ffn: int = 2048


def _convolved(spec: Convolved) -> nn.Sequential:
    kernel = nn.Conv2d(spec.inputs, spec.outputs, spec.side, padding=spec.side // 2, bias=False)
    return nn.Sequential(kernel, nn.BatchNorm2d(spec.outputs), nn.ReLU())


class _Bottleneck(nn.Module):
    def __init__(self, spec: Bottleneck) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(spec.inputs, spec.planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(spec.planes)
        self.conv2 = nn.Conv2d(spec.planes, spec.planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(spec.planes)
        self.conv3 = nn.Conv2d(spec.planes, spec.outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(spec.outputs)
        self.stride = spec.stride
        if spec.downsampled:
            kernel = nn.Conv2d(spec.inputs, spec.outputs, 1, bias=False)
            self.downsample = nn.Sequential(kernel, nn.BatchNorm2d(spec.outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three convolutions beside a shortcut; an average pool stands for a stride."""
        found = relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))
        found = self.bn3(self.conv3(avg_pool2d(found, self.stride)))
        if hasattr(self, "downsample"):
            x = self.downsample(avg_pool2d(x, self.stride))
        return relu(found + x)


class _AttentionPool(nn.Module):
    def __init__(self, sizes: CrisSizes, cells: int) -> None:
        super().__init__()
        deep, size = sizes.deep, sizes.embed_dim
        self.cells, self.heads = cells, deep // 64
        self.positional_embedding = nn.Parameter(torch.zeros(cells**2 + 1, deep))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(deep, deep) for _ in range(3))
        self.c_proj = nn.Linear(deep, size)
        self.connect = nn.Sequential(nn.Conv2d(deep, size, 1, bias=False), nn.BatchNorm2d(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of all cells to all, beside a convolution; positions without the class token's."""
        side = x.shape[2:]
        own = self.positional_embedding[1:].T.reshape(1, -1, self.cells, self.cells)
        places = interpolate(own, size=tuple(side), mode="bicubic", align_corners=False)
        rows = (x + places).flatten(2).transpose(1, 2)
        heads = [
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        found = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        grid = self.c_proj(found).transpose(1, 2).unflatten(2, tuple(side))
        return relu(grid + self.connect(x))


class _Visual(nn.Module):
    def __init__(self, spec: CrisImage) -> None:
        super().__init__()
        for i, (outputs, inputs, stride) in enumerate(spec.stem(), 1):
            kernel = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            setattr(self, f"conv{i}", kernel)
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        stages: dict[int, list[nn.Module]] = {}
        for stage, block in spec.blocks():
            stages.setdefault(stage, []).append(_Bottleneck(block))
        for stage, blocks in stages.items():
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.attnpool = _AttentionPool(spec.sizes, spec.cells)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps behind the second and third stage, and the pooled last one."""
        for i in (1, 2, 3):
            x = relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        maps = [avg_pool2d(x, 2)]
        for i in range(1, 5):
            maps.append(getattr(self, f"layer{i}")(maps[-1]))
        return maps[2], maps[3], self.attnpool(maps[4])


class _TextBlock(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.attn = nn.MultiheadAttention(width, sizes.text_heads, batch_first=True)
        self.mlp: Any = nn.Module()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.c_proj = nn.Linear(4 * width, width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Causal attention and the MLP with CLIP's activation."""
        normed, length = self.ln_1(x), x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attn(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        wide = self.mlp.c_fc(self.ln_2(x))
        found: torch.Tensor = x + self.mlp.c_proj(wide * torch.sigmoid(1.702 * wide))
        return found


class _Backbone(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        self.visual = _Visual(CrisImage(sizes))
        self.transformer: Any = nn.Module()
        blocks = [_TextBlock(sizes) for _ in range(sizes.text_layers)]
        self.transformer.resblocks = nn.Sequential(*blocks)
        width = sizes.text_width
        self.token_embedding = nn.Embedding(sizes.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(sizes.context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, sizes.embed_dim))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Words ``[texts, length, width]``, and vectors ``[texts, embed_dim]`` of the end tokens."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        words = self.ln_final(self.transformer.resblocks(x))
        ends = words[torch.arange(len(ids)), ids.argmax(dim=-1)]
        return words, ends @ self.text_projection


class _Neck(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        deepest = sizes.pyramid[2]
        self.txt_proj = nn.Sequential(
            nn.Linear(sizes.embed_dim, deepest, bias=False), nn.BatchNorm1d(deepest), nn.ReLU()
        )
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(deepest), nn.ReLU())
        for level in CrisImage(sizes).levels():
            self.add_module(level.name.removeprefix("neck."), _convolved(level))
        joins = CrisMask(sizes).joins()
        first: Any = nn.Module()
        first.conv1 = _convolved(joins.pop("coordconv.0.conv1"))
        self.coordconv = nn.Sequential(first, _convolved(joins.pop("coordconv.1")))
        for name, layer in joins.items():
            self.add_module(name, _convolved(layer))

    def levels(self, maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What is made of the maps without the text, the finest first and halved."""
        v3, v4, v5 = maps
        parts: Any = self
        return avg_pool2d(parts.f3_v_proj(v3), 2), parts.f2_v_proj(v4), parts.f1_v_proj(v5)

    def forward(self, levels: tuple[torch.Tensor, ...], state: torch.Tensor) -> torch.Tensor:
        """Joined levels ``[texts, dim, grid, grid]``."""
        f3, f4, f5 = levels
        parts: Any = self
        f5 = self.norm_layer(f5 * self.txt_proj(state)[..., None, None])
        f4 = parts.f2_cat(torch.cat([f4, _doubled(f5)], dim=1))
        f3 = parts.f3_cat(torch.cat([f3, f4], dim=1))
        found = [parts.f4_proj3(f3), parts.f4_proj4(f4), _doubled(parts.f4_proj5(f5))]
        x = parts.aggr(torch.cat(found, dim=1))
        side = torch.linspace(-1, 1, x.shape[-1])
        y, horizontal = torch.meshgrid(side, side, indexing="ij")
        coordinates = torch.stack([horizontal, y]).expand(len(x), -1, -1, -1)
        first: Any = self.coordconv[0]
        joined: torch.Tensor = self.coordconv[1](first.conv1(torch.cat([x, coordinates], dim=1)))
        return joined


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return interpolate(x, scale_factor=2, mode="bilinear")


class _DecoderLayer(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        dim = sizes.dim
        self.self_attn = nn.MultiheadAttention(dim, sizes.num_head, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, sizes.num_head, batch_first=True)
        for name in ("self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3"):
            self.add_module(name, nn.LayerNorm(dim))
        self.ffn = nn.Sequential(
            nn.Linear(dim, sizes.dim_ffn),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.LayerNorm(sizes.dim_ffn),
            nn.Linear(sizes.dim_ffn, dim),
        )

    def forward(
        self,
        x: torch.Tensor,
        words: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        padding: torch.Tensor,
    ) -> torch.Tensor:
        """Pixels see pixels, then words; a norm stands before and behind each."""
        parts: Any = self
        normed = parts.norm1(x)
        asked = normed + places[0]
        x = x + parts.self_attn_norm(self.self_attn(asked, asked, normed)[0])
        asked = parts.norm2(x) + places[0]
        keys = words + places[1]
        seen = self.multihead_attn(asked, keys, words, key_padding_mask=padding)[0]
        x = x + parts.cross_attn_norm(seen)
        found: torch.Tensor = x + self.ffn(parts.norm3(x))
        return found


class _Decoder(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(sizes) for _ in range(sizes.num_layers))
        self.norm = nn.LayerNorm(sizes.dim)

    def forward(
        self, grid: torch.Tensor, words: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        """The grid ``[texts, dim, side, side]`` after it has seen the words."""
        dim, side = grid.shape[1], grid.shape[2]
        waves = _waves(dim // 2, side)
        columns = waves.expand(side, -1, -1)
        rows = waves[:, None].expand(-1, side, -1)
        pixels = torch.cat([columns, rows], dim=-1).flatten(0, 1)
        places = (pixels, _waves(dim, words.shape[1]))
        x = grid.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, words, places, padding)
        found: torch.Tensor = self.norm(x).transpose(1, 2).unflatten(2, (side, side))
        return found


def _waves(dim: int, length: int) -> torch.Tensor:
    """Sines and cosines in turn, ``[length, dim]`` (arXiv 1706.03762, section 3.5)."""
    rates = torch.exp(torch.arange(0.0, dim, 2) * -(math.log(10000.0) / dim))
    angles = torch.arange(0.0, length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class _Projector(nn.Module):
    def __init__(self, sizes: CrisSizes) -> None:
        super().__init__()
        kernel, (first, second) = sizes.dim // 2, CrisMask(sizes).upsampled()
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            _convolved(first),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            _convolved(second),
            nn.Conv2d(kernel, kernel, 1),
        )
        self.txt = nn.Linear(sizes.embed_dim, kernel * TAPS + 1)

    def forward(self, grid: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Logits ``[texts, height, width]``: each text's own kernel over its own maps."""
        x, made = self.vis(grid), self.txt(state)
        texts, channels, height, width = x.shape
        kernels = made[:, :-1].reshape(texts, channels, 3, 3)
        flat = x.reshape(1, texts * channels, height, width)
        return conv2d(flat, kernels, made[:, -1], padding=1, groups=texts)[0]


class CRIS(PreTrainedModel):  # type: ignore[misc]
    """The whole network; `levels`, `texts` and `masks` are what its three graphs compute."""

    config_class = CRISConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing: ClassVar[list[str]] = [r"num_batches_tracked"]

    def __init__(self, config: CRISConfig) -> None:
        super().__init__(config)
        sizes = cris_sizes(config.to_dict())
        self.backbone, self.neck = _Backbone(sizes), _Neck(sizes)
        self.decoder, self.proj = _Decoder(sizes), _Projector(sizes)
        self.post_init()

    def levels(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the image gives without a text, the finest level first."""
        return self.neck.levels(self.backbone.visual(pixel_values))

    def texts(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors, words, and 1.0 where a word is not padding (whose id is 0)."""
        words, state = self.backbone.encode_text(input_ids)
        return state, words, (input_ids != 0).float()

    def masks(
        self,
        levels: tuple[torch.Tensor, ...],
        state: torch.Tensor,
        words: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits ``[texts, height, width]`` at a quarter of the image's resolution."""
        grid = self.decoder(self.neck(levels, state), words, mask == 0)
        logits: torch.Tensor = self.proj(grid, state)
        return logits

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of a text for each image."""
        return self.masks(self.levels(pixel_values), *self.texts(input_ids))
