"""The ViT encoder (arXiv 2010.11929) whose rows a decoder sees by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import (
    Feed,
    TensorSpec,
    VitNames,
    VitSpec,
    block_tensors,
    norm_tensors,
)
from exporter.families.config import choice, count, flag, positive
from exporter.families.specs.examples import example_tiles
from exporter.families.specs.gpt2 import Gpt2Spec, conv1d_tensors
from exporter.families.specs.layers import class_token_and_patch_tensors, linear_tensors

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
POOLER = "not used: the decoder sees the rows, not their summary"
NAMES = VitNames(
    patch="embeddings.patch_embeddings.projection",
    blocks="layers.",
    attention="attention.",
    out="o_proj",
    first_norm="layernorm_before",
    second_norm="layernorm_after",
)


@dataclass(frozen=True)
class CrossVit:
    """A ViT with all that turns its rows into a decoder's cross keys and values.

    `projection`: the linear layer (without weight or bias) that brings the rows to the decoder's
    width, empty where the widths are equal; `pooler_size`: outputs of the unused pooler.
    """

    tower: VitSpec
    decoder: Gpt2Spec
    projection: str
    pooler_size: int

    @property
    def rows(self) -> int:
        """Rows that the decoder sees: class token and patches."""
        return self.tower.patches**2 + 1

    @property
    def output_size(self) -> int:
        """Width of keys, and of values, of one block of the decoder."""
        return self.decoder.hidden_size

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower, projection and cross keys and values."""
        tower = self.tower
        hidden, at = tower.hidden_size, f"{tower.prefix}embeddings."
        token, table = f"{at}cls_token", f"{at}position_embeddings"
        yield from class_token_and_patch_tensors(token, table, tower)
        for i in range(tower.layers):
            layer = f"{tower.prefix}{tower.names.blocks}{i}."
            yield from block_tensors(layer, hidden, tower.intermediate_size, tower.names)
        yield from norm_tensors(f"{tower.prefix}layernorm", hidden)
        for part, shape in (("weight", (self.pooler_size, hidden)), ("bias", (self.pooler_size,))):
            name = f"{tower.prefix}pooler.dense.{part}"
            yield TensorSpec(name, shape, reason=POOLER, used=False)
        if self.projection:
            yield from linear_tensors(self.projection, self.output_size, hidden, "vision")
        for i in range(self.decoder.layers):
            name, width = self.decoder.cross_layer(i), self.decoder.hidden_size
            yield from conv1d_tensors(name, 2 * width, width, "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_tiles(self.tower.image_size, rng)


def cross_vit(
    encoder: Mapping[str, Any], decoder: Gpt2Spec, prefix: str, projection: str
) -> CrossVit:
    """The encoder part of a config.json, with ViTConfig's defaults. Raises `InputRefused`."""
    where = "encoder"
    hidden = count(encoder, "hidden_size", 768, where)
    tower = VitSpec(
        hidden_size=hidden,
        layers=count(encoder, "num_hidden_layers", 12, where),
        heads=count(encoder, "num_attention_heads", 12, where),
        intermediate_size=count(encoder, "intermediate_size", 3072, where),
        patch_size=count(encoder, "patch_size", 16, where),
        image_size=count(encoder, "image_size", 224, where),
        norm_eps=positive(encoder, "layer_norm_eps", 1e-12, where),
        activation=choice(encoder, "hidden_act", "gelu", ACTIVATIONS, where),
        prefix=prefix,
        names=NAMES,
    )
    channels = count(encoder, "num_channels", 3, where)
    if channels != 3 or hidden % tower.heads or tower.patches < 1:
        raise InputRefused(
            f"config.json: {where} has {channels} channels, hidden size {hidden}, {tower.heads} heads and "
            f"patches of {tower.patch_size} in {tower.image_size} pixels; expected 3 channels, a hidden "
            "size divisible by the heads and at least one patch"
        )
    if not flag(encoder, "qkv_bias", True):
        raise InputRefused(f"config.json: {where}.qkv_bias is false; only true is known")
    pooler = count(encoder, "pooler_output_size", hidden, where)
    wide = hidden != decoder.hidden_size
    return CrossVit(tower, decoder, projection if wide else "", pooler)
