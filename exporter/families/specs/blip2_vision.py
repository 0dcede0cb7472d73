"""BLIP-2's vision part (arXiv 2301.12597): EVA-ViT-g, a Q-Former with learned queries, one projection."""

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
    norm_tensors,
)
from exporter.families.config import choice, count, flag, positive, section
from exporter.families.specs.examples import example_tiles
from exporter.families.specs.layers import (
    class_token_and_patch_tensors,
    fused_block_shapes,
    linear_tensors,
)

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
QUERIES = "learned queries: few bytes, added, not multiplied"
EVA_NAMES = VitNames(out="projection", fused="qkv")
TOWER, QFORMER, PROJECTION = "vision_model.", "qformer.", "language_projection"
QUERY_TOKENS = "query_tokens"


@dataclass(frozen=True)
class QFormer:
    """A post-norm encoder of `queries` learned rows, whose every `cross_every`-th block sees an image.

    Sizes in elements; `image_width`: width of the rows it sees; `prefix` is put before ``layernorm``
    and ``encoder.layer.{i}...``.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    norm_eps: float
    activation: str
    cross_every: int
    queries: int
    image_width: int
    prefix: str

    def block(self, layer: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.prefix}encoder.layer.{layer}."

    def sees(self, layer: int) -> bool:
        """Whether block `layer` has cross-attention."""
        return layer % self.cross_every == 0

    def attentions(self, layer: int) -> dict[str, int]:
        """The attentions of a block in the order of use: name in it to the width of keys' and values'
        inputs.
        """
        own = {"attention": self.hidden_size}
        return {**own, "crossattention": self.image_width} if self.sees(layer) else own

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the encoder; the queries are not among them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        yield from norm_tensors(f"{self.prefix}layernorm", hidden)
        for i in range(self.layers):
            at = self.block(i)
            for name, width in self.attentions(i).items():
                for part in ("query", "key", "value"):
                    columns = hidden if part == "query" else width
                    yield from linear_tensors(
                        f"{at}{name}.attention.{part}", hidden, columns, "vision"
                    )
                yield from linear_tensors(f"{at}{name}.output.dense", hidden, hidden, "vision")
                yield from norm_tensors(f"{at}{name}.output.LayerNorm", hidden)
            yield from linear_tensors(f"{at}intermediate_query.dense", inner, hidden, "vision")
            yield from linear_tensors(f"{at}output_query.dense", hidden, inner, "vision")
            yield from norm_tensors(f"{at}output_query.LayerNorm", hidden)


@dataclass(frozen=True)
class Blip2Vision:
    """Tower, Q-Former and projection of one model; `projection` is put before ``.weight``."""

    tower: VitSpec
    qformer: QFormer
    query_tokens: str
    projection: str
    output_size: int

    @property
    def rows(self) -> int:
        """Rows that the Q-Former sees: class token and patches."""
        return self.tower.patches**2 + 1

    @property
    def tokens(self) -> int:
        """Rows of features per image."""
        return self.qformer.queries

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower, queries, Q-Former and projection."""
        tower = self.tower
        hidden, inner, at = tower.hidden_size, tower.intermediate_size, f"{tower.prefix}embeddings."
        token, table = f"{at}class_embedding", f"{at}position_embedding"
        yield from class_token_and_patch_tensors(token, table, tower)
        shapes = fused_block_shapes(hidden, inner, "self_attn.qkv", "self_attn.projection")
        for i in range(tower.layers):
            layer = f"{tower.prefix}encoder.layers.{i}."
            for name, shape in shapes.items():
                yield from linear_tensors(layer + name, *shape, "vision")
            yield from norm_tensors(f"{layer}layer_norm1", hidden)
            yield from norm_tensors(f"{layer}layer_norm2", hidden)
        yield from norm_tensors(f"{tower.prefix}post_layernorm", hidden)
        queries = (1, self.qformer.queries, self.qformer.hidden_size)
        yield TensorSpec(self.query_tokens, queries, reason=QUERIES)
        yield from self.qformer.tensors()
        yield from linear_tensors(
            self.projection, self.output_size, self.qformer.hidden_size, "vision"
        )

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_tiles(self.tower.image_size, rng)


def blip2_vision(config: Mapping[str, Any], output_size: int) -> Blip2Vision:
    """The vision part of a parsed config.json, with Blip2Config's defaults; `output_size` is the
    decoder's width. Raises `InputRefused` on a bad config.
    """
    tower = _tower(_part(config, "vision_config"))
    queries = count(config, "num_query_tokens", 32, "config")
    qformer = _qformer(_part(config, "qformer_config"), queries, tower.hidden_size)
    return Blip2Vision(tower, qformer, QUERY_TOKENS, PROJECTION, output_size)


def _part(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return {} if config.get(key) is None else section(config, key)


def _tower(vision: Mapping[str, Any]) -> VitSpec:
    where = "vision_config"
    tower = VitSpec(
        hidden_size=count(vision, "hidden_size", 1408, where),
        layers=count(vision, "num_hidden_layers", 39, where),
        heads=count(vision, "num_attention_heads", 16, where),
        intermediate_size=count(vision, "intermediate_size", 6144, where),
        patch_size=count(vision, "patch_size", 14, where),
        image_size=count(vision, "image_size", 224, where),
        norm_eps=positive(vision, "layer_norm_eps", 1e-6, where),
        activation=choice(vision, "hidden_act", "gelu", ACTIVATIONS, where),
        prefix=TOWER,
        names=EVA_NAMES,
    )
    if tower.hidden_size % tower.heads or tower.patches < 1:
        raise InputRefused(
            f"config.json: {where} has hidden size {tower.hidden_size}, {tower.heads} heads and patches of "
            f"{tower.patch_size} in {tower.image_size} pixels; expected a hidden size divisible by the "
            "heads and at least one patch"
        )
    if not flag(vision, "qkv_bias", True):
        raise InputRefused(f"config.json: {where}.qkv_bias is false; only true is known")
    return tower


def _qformer(settings: Mapping[str, Any], queries: int, image_width: int) -> QFormer:
    where = "qformer_config"
    # Blip2Config itself puts the tower's width over what is said here.
    qformer = QFormer(
        hidden_size=count(settings, "hidden_size", 768, where),
        layers=count(settings, "num_hidden_layers", 12, where),
        heads=count(settings, "num_attention_heads", 12, where),
        intermediate_size=count(settings, "intermediate_size", 3072, where),
        norm_eps=positive(settings, "layer_norm_eps", 1e-12, where),
        activation=choice(settings, "hidden_act", "gelu", ACTIVATIONS, where),
        cross_every=count(settings, "cross_attention_frequency", 2, where),
        queries=queries,
        image_width=image_width,
        prefix=QFORMER,
    )
    if qformer.hidden_size % qformer.heads:
        raise InputRefused(
            f"config.json: {where} has hidden size {qformer.hidden_size} and {qformer.heads} heads; "
            "expected a multiple"
        )
    if flag(settings, "use_qformer_text_input", False):
        raise InputRefused(
            f"config.json: {where}.use_qformer_text_input is true (InstructBLIP); only false is known"
        )
    return qformer
