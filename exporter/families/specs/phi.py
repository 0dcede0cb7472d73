"""The Phi decoder (arXiv 2309.05463): one norm a block, attention and MLP beside each other, biases.

Names and the fused query-key-value matrix are those of Moondream's published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, Feed, TensorSpec, norm_tensors
from exporter.families.config import choice, count, positive, rope_theta
from exporter.families.specs.decoder import example_texts
from exporter.families.specs.layers import fused_block_shapes, linear_tensors

ROTARY_SHARE = 0.5
# Positions of the example prompts that see each other both ways.
EXAMPLE_PREFIX = 3


@dataclass(frozen=True)
class PhiSpec:
    """A decoder of the Phi kind; sizes in elements, names as in the checkpoint.

    `rotary_dim` of a head's `head_dim` values turn with the position. The first `prefix_length`
    positions (start token and image) see each other both ways, all others look back only.
    `prefix` is put before ``blocks.{i}.attn.qkv.weight`` and its siblings; the rows of a fused matrix
    are all queries, all keys, all values.
    """

    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    prefix_length: int
    prefix: str
    embedding: str
    final_norm: str
    head: str
    tied: bool = False

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: all."""
        return self.heads

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block by its name within the block, in the order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return fused_block_shapes(hidden, inner, "attn.qkv", "attn.proj")

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has: the embedding first, the head last."""
        table = (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embedding, table, "embedding")
        for i in range(self.layers):
            block = f"{self.prefix}blocks.{i}."
            yield from norm_tensors(block + "ln", self.hidden_size)
            for name, shape in self.matrix_shapes().items():
                yield from linear_tensors(block + name, *shape, "decoder")
        yield from norm_tensors(self.final_norm, self.hidden_size)
        yield TensorSpec(self.head, table, "head")
        yield TensorSpec(_bias_of(self.head), table[:1], reason=BIAS)

    @property
    def head_bias(self) -> str:
        """Name of the head's bias."""
        return _bias_of(self.head)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two shapes; see `TextDecoder`."""
        for _, _, past, feed in example_texts(self, rng):
            feed["prefix_length"] = np.array(0 if past else EXAMPLE_PREFIX, np.int64)
            yield feed


def phi_spec(text: Mapping[str, Any], *, prefix: str, prefix_length: int) -> PhiSpec:
    """The decoder of the text part `text` of a config.json, with PhiConfig's defaults.

    `prefix` is put before the names of all tensors. Raises `InputRefused` on a bad config.
    """
    where = "text_config"
    choice(text, "hidden_act", "gelu_new", ("gelu_new",), where)
    if text.get("qk_layernorm"):
        raise InputRefused(f"config.json: {where}.qk_layernorm is set; only false is known")
    hidden = count(text, "hidden_size", 2048, where)
    heads = count(text, "num_attention_heads", 32, where)
    if count(text, "num_key_value_heads", heads, where) != heads:
        raise InputRefused(
            f"config.json: {where}.num_key_value_heads is {text['num_key_value_heads']}; expected as "
            f"many as heads, {heads}"
        )
    head_dim = hidden // heads
    share = positive(text, "partial_rotary_factor", ROTARY_SHARE, where)
    rotary = int(head_dim * share)
    if hidden % heads or not 0 < rotary <= head_dim or rotary % 2:
        raise InputRefused(
            f"config.json: {where} has a hidden size of {hidden}, {heads} heads and turns {share} of "
            "each; expected a size divisible by the heads, and an even number of turned values"
        )
    return PhiSpec(
        hidden_size=hidden,
        layers=count(text, "num_hidden_layers", 24, where),
        heads=heads,
        head_dim=head_dim,
        rotary_dim=rotary,
        intermediate_size=count(text, "intermediate_size", 8192, where),
        vocab_size=count(text, "vocab_size", 51200, where),
        norm_eps=positive(text, "layer_norm_eps", 1e-5, where),
        rope_theta=rope_theta(text),
        max_positions=count(text, "max_position_embeddings", 2048, where),
        prefix_length=prefix_length,
        prefix=prefix,
        embedding=f"{prefix}wte",
        final_norm=f"{prefix}post_ln",
        head=f"{prefix}lm_head.weight",
    )


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
