"""Encoder and decoder layers of ``torch.nn``: post-norm, biased, queries, keys and values in one matrix.

The layers of "Attention Is All You Need" (arXiv 1706.03762) with torch's names and learned positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.families.base import POSITIONS, Feed, Role, TensorSpec, norm_tensors
from exporter.families.specs.gpt2 import example_captions
from exporter.families.specs.layers import attention_tensors, linear_tensors

# torch.nn's default, which its layers are made with here.
NORM_EPS = 1e-5


@dataclass(frozen=True)
class PostNormSizes:
    """What encoder and decoder share; `activation` is ``relu`` or ``gelu``."""

    hidden_size: int
    heads: int
    intermediate_size: int
    activation: str

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.heads

    def encoder_layer(self, name: str) -> Iterator[TensorSpec]:
        """Tensors of a ``TransformerEncoderLayer`` called `name` (with its dot)."""
        yield from attention_tensors(f"{name}self_attn", self.hidden_size, "vision")
        yield from self._rest(name, "vision", norms=2)

    def decoder_layer(self, name: str) -> Iterator[TensorSpec]:
        """Tensors of a ``TransformerDecoderLayer`` called `name` (with its dot)."""
        yield from attention_tensors(f"{name}self_attn", self.hidden_size, "decoder")
        yield from attention_tensors(f"{name}multihead_attn", self.hidden_size, "decoder")
        yield from self._rest(name, "decoder", norms=3)

    def _rest(self, name: str, role: Role, *, norms: int) -> Iterator[TensorSpec]:
        hidden, inner = self.hidden_size, self.intermediate_size
        yield from linear_tensors(f"{name}linear1", inner, hidden, role)
        yield from linear_tensors(f"{name}linear2", hidden, inner, role)
        for number in range(1, norms + 1):
            yield from norm_tensors(f"{name}norm{number}", hidden)


@dataclass(frozen=True)
class PostNormDecoder:
    """A stack of torch's decoder layers between an embedding with learned positions and a head.

    The image's keys and values are a part of ``multihead_attn.in_proj_weight`` and computed in the
    vision graph; `prefix` is put before the layers' numbers.
    """

    sizes: PostNormSizes
    layers: int
    vocab_size: int
    max_positions: int
    embedding: str
    positions: str
    prefix: str
    head: str
    tied: bool

    @property
    def hidden_size(self) -> int:
        """Width of a hidden state."""
        return self.sizes.hidden_size

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.sizes.heads

    @property
    def kv_heads(self) -> int:
        """As many as query heads."""
        return self.sizes.heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.sizes.head_dim

    def layer(self, number: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{self.prefix}{number}."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has; the head has no bias."""
        table = (self.vocab_size, self.hidden_size)
        yield TensorSpec(self.embedding, table, "embedding")
        yield TensorSpec(self.positions, (self.max_positions, self.hidden_size), reason=POSITIONS)
        for number in range(self.layers):
            yield from self.sizes.decoder_layer(self.layer(number))
        if not self.tied:
            yield TensorSpec(self.head, table, "head")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two shapes; see `TextDecoder`."""
        return example_captions(self, rng)
