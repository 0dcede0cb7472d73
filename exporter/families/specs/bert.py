"""BERT and DistilBERT (arXiv 1810.04805, 1910.01108): which tensors the encoder and its heads have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.families.base import POSITIONS, Feed, TensorSpec, norm_tensors
from exporter.families.specs.layers import linear_tensors

TYPES = "token types: added, not multiplied"


@dataclass(frozen=True)
class BertNames:
    """What an encoder calls its parts, behind its prefix; those of a block behind the block's name.

    `types` is empty where there are no token types.
    """

    words: str
    positions: str
    types: str
    norm: str
    blocks: str
    query: str
    key: str
    value: str
    out: str
    first_norm: str
    up: str
    down: str
    second_norm: str


BERT_NAMES = BertNames(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings",
    norm="embeddings.LayerNorm",
    blocks="encoder.layer.",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    first_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    second_norm="output.LayerNorm",
)
DISTILBERT_NAMES = BertNames(
    words="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    types="",
    norm="embeddings.LayerNorm",
    blocks="transformer.layer.",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    first_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    second_norm="output_layer_norm",
)


@dataclass(frozen=True)
class BertSpec:
    """Sizes of a post-norm encoder of texts; `prefix` (with its dot) is put before all names.

    `type_vocab_size`: kinds of token, 0 where there are none.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    norm_eps: float
    activation: str
    prefix: str
    names: BertNames = BERT_NAMES

    @property
    def head_dim(self) -> int:
        """Values of one head."""
        return self.hidden_size // self.heads

    def name(self, part: str) -> str:
        """Whole stem of a part of the embeddings."""
        return self.prefix + part

    def block(self, layer: int) -> str:
        """Stem of block `layer`, with its dot."""
        return f"{self.prefix}{self.names.blocks}{layer}."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of embeddings and blocks."""
        names, hidden, inner = self.names, self.hidden_size, self.intermediate_size
        words = (self.vocab_size, hidden)
        yield TensorSpec(f"{self.name(names.words)}.weight", words, "embedding")
        positions = (self.max_positions, hidden)
        yield TensorSpec(f"{self.name(names.positions)}.weight", positions, reason=POSITIONS)
        if names.types:
            types = (self.type_vocab_size, hidden)
            yield TensorSpec(f"{self.name(names.types)}.weight", types, reason=TYPES)
        yield from norm_tensors(self.name(names.norm), hidden)
        for layer in range(self.layers):
            at = self.block(layer)
            for part in (names.query, names.key, names.value, names.out):
                yield from linear_tensors(at + part, hidden, hidden, "decoder")
            yield from norm_tensors(at + names.first_norm, hidden)
            yield from linear_tensors(at + names.up, inner, hidden, "decoder")
            yield from linear_tensors(at + names.down, hidden, inner, "decoder")
            yield from norm_tensors(at + names.second_norm, hidden)

    def example_feeds(self, rng: np.random.Generator, *, types: bool) -> Iterator[Feed]:
        """Random texts: one alone, and two of different lengths; `types`: with kinds of token."""
        longest = self.max_positions
        for lengths in ((min(5, longest),), (min(11, longest), min(3, longest))):
            shape = (len(lengths), max(lengths))
            mask = np.arange(shape[1])[None] < np.array(lengths)[:, None]
            feed = {
                "input_ids": rng.integers(0, self.vocab_size, shape),
                "attention_mask": mask.astype(np.int64),
            }
            if types:
                feed["token_type_ids"] = rng.integers(0, self.type_vocab_size, shape)
            yield feed


@dataclass(frozen=True)
class HeadSpec:
    """A classification head: a classifier over every token, or over the first one behind `dense`.

    `dense` is empty where each token is classified; `activation` stands behind it.
    """

    labels: int
    dense: str = ""
    activation: str = ""

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        """Its one or two linear layers."""
        if self.dense:
            yield from linear_tensors(self.dense, hidden, hidden, "decoder")
        yield from linear_tensors("classifier", self.labels, hidden, "decoder")


@dataclass(frozen=True)
class TextEncoderSpec:
    """The graph of a text encoder with whatever head it has; `head` None gives hidden states."""

    bert: BertSpec
    head: HeadSpec | None

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of encoder and head."""
        yield from self.bert.tensors()
        if self.head is not None:
            yield from self.head.tensors(self.bert.hidden_size)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random texts of two shapes, one of them with padding."""
        return self.bert.example_feeds(rng, types=bool(self.bert.names.types))
