"""The OPT decoder (arXiv 2205.01068): learned positions, layer norms before attention and MLP, ReLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import POSITIONS, Feed, TensorSpec, norm_tensors
from exporter.families.config import choice, count, flag
from exporter.families.specs.decoder import example_texts
from exporter.families.specs.layers import linear_tensors

# The table's first rows are of no position.
POSITION_OFFSET = 2
# torch.nn.LayerNorm's default: OPTConfig has no key for it.
NORM_EPS = 1e-5
# Switches that change the network, with what every checkpoint but opt-350m has.
EXPECTED_FLAGS = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
}


@dataclass(frozen=True)
class OptSpec:
    """A decoder of the OPT kind; sizes in elements, names as in the checkpoint.

    `prefix` is put before ``embed_tokens``, ``embed_positions``, ``layers.{i}`` and
    ``final_layer_norm``; `head` is a whole tensor name.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    prefix: str
    head: str
    tied: bool

    @property
    def kv_heads(self) -> int:
        """As many as query heads."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.heads

    @property
    def embedding(self) -> str:
        """Name of the embedding's tensor."""
        return f"{self.prefix}embed_tokens.weight"

    @property
    def positions(self) -> str:
        """Name of the learned positions' tensor, ``[POSITION_OFFSET + max_positions, hidden]``."""
        return f"{self.prefix}embed_positions.weight"

    def block(self, layer: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.prefix}layers.{layer}."

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block by its name within the block, in the order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        parts = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        return {**parts, "fc1": (inner, hidden), "fc2": (hidden, inner)}

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has: the embedding first, the head (unless tied) last."""
        hidden, table = self.hidden_size, (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embedding, table, "embedding")
        positions = (POSITION_OFFSET + self.max_positions, hidden)
        yield TensorSpec(self.positions, positions, reason=POSITIONS)
        for i in range(self.layers):
            at = self.block(i)
            yield from norm_tensors(f"{at}self_attn_layer_norm", hidden)
            for name, shape in self.matrix_shapes().items():
                yield from linear_tensors(at + name, *shape, "decoder")
            yield from norm_tensors(f"{at}final_layer_norm", hidden)
        yield from norm_tensors(f"{self.prefix}final_layer_norm", hidden)
        if not self.tied:
            yield TensorSpec(self.head, table, "head")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two shapes; see `TextDecoder`."""
        for _, _, _, feed in example_texts(self, rng):
            yield feed


def opt_spec(text: Mapping[str, Any], *, prefix: str, head: str, tied: bool) -> OptSpec:
    """The decoder of the text part `text` of a config.json, with OPTConfig's defaults.

    Raises `InputRefused` on a bad config, and for the layout of opt-350m.
    """
    where = "text_config"
    choice(text, "activation_function", "relu", ("relu",), where)
    for key, expected in EXPECTED_FLAGS.items():
        if flag(text, key, expected) is not expected:
            raise InputRefused(
                f"config.json: {where}.{key} is {not expected}; only {expected} is known"
            )
    hidden = count(text, "hidden_size", 768, where)
    heads = count(text, "num_attention_heads", 12, where)
    width = count(text, "word_embed_proj_dim", hidden, where)
    if hidden % heads or width != hidden:
        raise InputRefused(
            f"config.json: {where} has hidden size {hidden}, {heads} heads and embeddings of {width}; "
            "expected embeddings of the hidden size, and that divisible by the heads"
        )
    return OptSpec(
        hidden_size=hidden,
        layers=count(text, "num_hidden_layers", 12, where),
        heads=heads,
        intermediate_size=count(text, "ffn_dim", 3072, where),
        vocab_size=count(text, "vocab_size", 50272, where),
        max_positions=count(text, "max_position_embeddings", 2048, where),
        prefix=prefix,
        head=head,
        tied=tied,
    )
