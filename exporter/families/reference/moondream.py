"""Moondream2 in torch, for the build side: transformers' Phi and SigLIP blocks on the published names.

transformers has no class for it. Here its Phi model and SigLIP encoder compute, and every parameter
belongs to a module with the published name, so that checkpoints load strictly and adapters that were
trained on the published class attach where they did there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, embedding, gelu
from transformers import (
    GenerationMixin,
    PhiConfig,
    PhiModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoder

from exporter.families.layouts.moondream import MODEL_TYPE

IMAGE = ("pixel_values", "stitch_index", "row_shares", "column_shares")


class MoondreamConfig(PreTrainedConfig):  # type: ignore[misc]
    """The config.json that `moondream_published.moondream_config` makes."""

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=PhiConfig, model_type="phi"),
        "vision_config": SubConfigSpec(
            config_class=SiglipVisionConfig, model_type="siglip_vision_model"
        ),
    }
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    region_config: dict[str, Any] | None = None
    prompt_config: dict[str, Any] | None = None
    image_token_id: int = 51199
    tie_word_embeddings: bool = False


class _Borrowed(nn.Module):
    """Computes with a module that belongs to another one, which may replace it by an adapted one."""

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__()
        # In a tuple: the parameters stay the owner's.
        self._place = (owner, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owner, name = self._place
        found: torch.Tensor = getattr(owner, name)(x)
        return found


class _Thirds:
    """Queries, keys and values of one fused layer, computed once for an input."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._last: tuple[torch.Tensor | None, tuple[torch.Tensor, ...]] = (None, ())

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._last[0] is not x:
            self._last = (x, torch.chunk(self._owner.qkv(x), 3, dim=-1))
        found = self._last[1][index]
        if index == 2:
            self._last = (None, ())
        return found


class _Third(nn.Module):
    """One of `_Thirds`; asked for in their order."""

    def __init__(self, thirds: _Thirds, index: int) -> None:
        super().__init__()
        self._thirds, self._index = (thirds,), index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._thirds[0].part(self._index, x)


class _Table(nn.Module):
    """The embedding, whose table is a parameter of its own in the published class."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self._text = (text,)

    @property
    def weight(self) -> torch.Tensor:
        table: torch.Tensor = self._text[0].wte
        return table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.weight)


def _layers(**sizes: tuple[int, int]) -> nn.ModuleDict:
    """Linear layers with bias by name, from (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def _block(config: Any, norms: tuple[str, ...]) -> nn.ModuleDict:
    hidden, inner = config.hidden_size, config.intermediate_size
    parts: dict[str, nn.Module] = {
        name: nn.LayerNorm(hidden, eps=config.layer_norm_eps) for name in norms
    }
    parts["attn"] = _layers(qkv=(hidden, 3 * hidden), proj=(hidden, hidden))
    parts["mlp"] = _layers(fc1=(hidden, inner), fc2=(inner, hidden))
    return nn.ModuleDict(parts)


def _lend_attention(attention: Any, owner: Any, out: str) -> None:
    thirds = _Thirds(owner)
    for index, part in enumerate("qkv"):
        setattr(attention, f"{part}_proj", _Third(thirds, index))
    setattr(attention, out, _Borrowed(owner, "proj"))


class _Text(nn.Module):
    """Parameters of the decoder; `lend` makes transformers' Phi compute with them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.wte = nn.Parameter(torch.zeros(config.vocab_size, hidden))
        blocks = (_block(config, ("ln",)) for _ in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(blocks)
        self.post_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(hidden, config.vocab_size)

    def lend(self, phi: Any) -> None:
        phi.embed_tokens = _Table(self)
        phi.final_layernorm = _Borrowed(self, "post_ln")
        blocks: Any = self.blocks
        for layer, block in zip(phi.layers, blocks, strict=True):
            layer.input_layernorm = _Borrowed(block, "ln")
            _lend_attention(layer.self_attn, block.attn, "dense")
            for name in ("fc1", "fc2"):
                setattr(layer.mlp, name, _Borrowed(block.mlp, name))


class _Vision(nn.Module):
    """Parameters of tower and projection; `lend` makes transformers' SigLIP compute with them."""

    def __init__(self, config: Any, output_size: int) -> None:
        super().__init__()
        hidden, side = config.hidden_size, config.image_size // config.patch_size
        self.patch_emb = nn.Linear(3 * config.patch_size**2, hidden)
        self.pos_emb = nn.Parameter(torch.zeros(1, side**2, hidden))
        blocks = (_block(config, ("ln1", "ln2")) for _ in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(blocks)
        self.post_ln = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        inner = config.projection_inner_size
        self.proj_mlp = _layers(fc1=(2 * hidden, inner), fc2=(inner, output_size))

    def lend(self, encoder: Any) -> None:
        blocks: Any = self.blocks
        for layer, block in zip(encoder.layers, blocks, strict=True):
            layer.layer_norm1, layer.layer_norm2 = _Borrowed(block, "ln1"), _Borrowed(block, "ln2")
            _lend_attention(layer.self_attn, block.attn, "out_proj")
            for name in ("fc1", "fc2"):
                setattr(layer.mlp, name, _Borrowed(block.mlp, name))


class _Region(nn.Module):
    """Parameters of the part that answers with points; nothing here computes with them."""

    def __init__(self, config: dict[str, int], hidden: int) -> None:
        super().__init__()
        coordinates, sizes = config["coordinate_features"], config["size_features"]
        inner = config["inner_size"]
        self.coord_features = nn.Parameter(torch.zeros(1, coordinates // 2))
        self.size_features = nn.Parameter(torch.zeros(2, sizes // 2))
        self.coord_encoder = nn.Linear(coordinates, hidden)
        self.coord_decoder = _layers(fc1=(hidden, inner), fc2=(inner, config["coordinate_bins"]))
        self.size_encoder = nn.Linear(sizes, hidden)
        self.size_decoder = _layers(fc1=(hidden, inner), fc2=(inner, config["size_bins"]))


class MoondreamForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The model with its head. One image in a prompt, batch 1, no padding."""

    config_class = MoondreamConfig
    _supports_sdpa = True

    def __init__(self, config: MoondreamConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.model: Any = nn.Module()
        self.model.text = _Text(text)
        self.model.vision = _Vision(vision, text.hidden_size)
        self.model.region = _Region(config.region_config or {}, text.hidden_size)
        with torch.device("meta"):  # their own parameters are never used
            phi, siglip = PhiModel(text).eval(), SiglipEncoder(vision).eval()
        with torch.device("cpu"):
            phi.rotary_emb = PhiRotaryEmbedding(text)
        self.model.text.lend(phi)
        self.model.vision.lend(siglip)
        # In a tuple: no modules of this one, or adapters would attach to them.
        self._computing = (phi, siglip)
        self.side = vision.image_size // vision.patch_size
        self.prefix_length = 1 + self.side**2
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding's table as a module."""
        return _Table(self.model.text)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        head: nn.Module = self.model.text.lm_head
        return head

    def tower_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rows ``[crops, places, hidden]`` of crops ``[crops, 3, side, side]``."""
        vision: Any = self.model.vision
        patch, side = self.config.vision_config.patch_size, self.side
        cut = pixels.reshape(len(pixels), 3, side, patch, side, patch)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), side**2, -1)
        states = self._computing[1](inputs_embeds=vision.patch_emb(patches) + vision.pos_emb)
        rows: torch.Tensor = vision.post_ln(states.last_hidden_state)
        return rows

    def project(self, whole: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Feature rows of the whole image's rows and the crops' averages, ``[places, hidden]`` each."""
        layers: Any = self.model.vision.proj_mlp
        wide = gelu(layers["fc1"](torch.cat([whole, local], dim=-1)), approximate="tanh")
        rows: torch.Tensor = layers["fc2"](wide)
        return rows

    def image_features(
        self,
        pixel_values: torch.Tensor,
        stitch_index: torch.Tensor,
        row_shares: torch.Tensor,
        column_shares: torch.Tensor,
    ) -> torch.Tensor:
        """Feature rows ``[places, hidden]`` of one image, from the vision graph's inputs."""
        rows = self.tower_rows(pixel_values[0])
        grid = rows.reshape(-1, rows.shape[-1])[stitch_index]
        pooled = torch.einsum("yh,hwc,xw->yxc", row_shares, grid, column_shares)
        return self.project(rows[0], pooled.reshape(self.side**2, -1))

    def stitched_features(
        self,
        pixel_values: torch.Tensor,
        stitch_index: torch.Tensor,
        row_shares: torch.Tensor,  # noqa: ARG002 (torch has an average of its own)
        column_shares: torch.Tensor,  # noqa: ARG002
    ) -> torch.Tensor:
        """The same by cutting the crops' margins off, joining them and torch's adaptive average."""
        rows, side = self.tower_rows(pixel_values[0]), self.side
        margin = self.config.vision_config.overlap_margin
        down, across = ((n - 2 * margin) // (side - 2 * margin) for n in stitch_index.shape)
        crops = rows[1:].reshape(down, across, side, side, -1)
        lines = []
        for y in range(down):
            top, bottom = (0 if y == 0 else margin), (side if y == down - 1 else side - margin)
            parts = []
            for x in range(across):
                left, right = (
                    (0 if x == 0 else margin),
                    (side if x == across - 1 else side - margin),
                )
                parts.append(crops[y, x, top:bottom, left:right])
            lines.append(torch.cat(parts, dim=1))
        grid = torch.cat(lines, dim=0).permute(2, 0, 1)
        pooled = adaptive_avg_pool2d(grid, (side, side)).permute(1, 2, 0)
        return self.project(rows[0], pooled.reshape(side**2, -1))

    def decode(self, embeds: torch.Tensor, cache: Any, prefix: int) -> BaseModelOutputWithPast:
        """Phi's output for embeddings ``[1, length, hidden]`` behind `cache`; the first `prefix` of a new
        text see each other both ways.
        """
        mask = None
        if prefix:
            length = embeds.shape[1]
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            seen[:prefix, :prefix] = True
            lowest = torch.finfo(embeds.dtype).min
            mask = torch.zeros(1, 1, length, length, dtype=embeds.dtype).masked_fill(~seen, lowest)
        found: BaseModelOutputWithPast = self._computing[0](
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return found

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        pixel_values: torch.Tensor | None = None,
        stitch_index: torch.Tensor | None = None,
        row_shares: torch.Tensor | None = None,
        column_shares: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[1, length, vocab]``; with an image, `input_ids` are a whole prompt from its start."""
        embeds = self.get_input_embeddings()(input_ids)
        image = (pixel_values, stitch_index, row_shares, column_shares)
        given = [value for value in image if value is not None]
        if len(given) == len(IMAGE):
            features = self.image_features(*given)
            embeds = embeds.masked_scatter(
                (input_ids == self.config.image_token_id)[..., None], features
            )
        out = self.decode(embeds, past_key_values, self.prefix_length if given else 0)
        logits = self.get_output_embeddings()(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The image goes in with the prompt only."""
        found: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if not kwargs.get("is_first_iteration"):
            found |= dict.fromkeys(IMAGE)
        return found
