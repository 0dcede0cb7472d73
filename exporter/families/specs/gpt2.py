"""The GPT-2 decoder with cross-attention: sizes, tensors, and how a config.json says them.

Published in encoder-decoder checkpoints of transformers. Its linear layers are Conv1D modules, stored
as ``[inputs, outputs]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import BIAS, POSITIONS, Feed, Role, TensorSpec, norm_tensors
from exporter.families.config import choice, count, flag, positive
from exporter.families.specs.decoder import TextDecoder, example_texts

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu")
# Switches of GPT2Config that change the network and that no known captioner sets otherwise.
EXPECTED_FLAGS = {
    "add_cross_attention": (True, False),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
}
# Rows of image features that example inputs have; the graph takes any number.
EXAMPLE_ROWS = 7


@dataclass(frozen=True)
class Gpt2Spec:
    """GPT-2 with cross-attention in every block; names as in the checkpoint.

    `prefix` is put before ``wte``, ``wpe``, ``h.{i}`` and ``ln_f``. The projections of the image to
    cross keys and values belong to the vision part (`cross_layer`), which computes them once.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    activation: str
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
        return f"{self.prefix}wte.weight"

    @property
    def positions(self) -> str:
        """Name of the learned positions' tensor."""
        return f"{self.prefix}wpe.weight"

    def block(self, layer: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self.prefix}h.{layer}."

    def cross_layer(self, layer: int) -> str:
        """Name (without weight or bias) of the projection of the image to cross keys and values."""
        return f"{self.block(layer)}crossattention.c_attn"

    def layer_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer of a block by its name in it, in the order of use."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "attn.c_attn": (3 * hidden, hidden),
            "attn.c_proj": (hidden, hidden),
            "crossattention.q_attn": (hidden, hidden),
            "crossattention.c_proj": (hidden, hidden),
            "mlp.c_fc": (inner, hidden),
            "mlp.c_proj": (hidden, inner),
        }

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has, but those of `cross_layer`."""
        hidden = self.hidden_size
        yield TensorSpec(self.embedding, (self.vocab_size, hidden), "embedding")
        yield TensorSpec(self.positions, (self.max_positions, hidden), reason=POSITIONS)
        for i in range(self.layers):
            for norm in ("ln_1", "ln_cross_attn", "ln_2"):
                yield from norm_tensors(self.block(i) + norm, hidden)
            for name, (outputs, inputs) in self.layer_shapes().items():
                yield from conv1d_tensors(self.block(i) + name, outputs, inputs, "decoder")
        yield from norm_tensors(f"{self.prefix}ln_f", hidden)
        if not self.tied:
            yield TensorSpec(self.head, (self.vocab_size, hidden), "head")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two shapes; see `TextDecoder`."""
        return example_captions(self, rng)


def conv1d_tensors(name: str, outputs: int, inputs: int, role: Role) -> Iterator[TensorSpec]:
    """Weight and bias of a Conv1D called `name`."""
    yield TensorSpec(f"{name}.weight", (inputs, outputs), role, turned=True)
    yield TensorSpec(f"{name}.bias", (outputs,), reason=BIAS)


def cross_names(layers: int) -> list[str]:
    """Outputs of the vision graph and inputs of the decoder graph: the image as its blocks see it."""
    return [f"cross_key_values.{i}.{part}" for i in range(layers) for part in ("key", "value")]


def example_captions(spec: TextDecoder, rng: np.random.Generator) -> Iterator[Feed]:
    """Inputs at two shapes of a decoder whose every block sees the image by cross-attention."""
    for batch, _, _, feed in example_texts(spec, rng):
        shape = (batch, spec.heads, EXAMPLE_ROWS, spec.head_dim)
        for name in cross_names(spec.layers):
            feed[name] = rng.standard_normal(shape, np.float32)
        yield feed


def gpt2_spec(decoder: Mapping[str, Any], prefix: str, head: str) -> Gpt2Spec:
    """The decoder part of a config.json, with GPT2Config's defaults. Raises `InputRefused`."""
    where = "decoder"
    for key, (expected, default) in EXPECTED_FLAGS.items():
        if flag(decoder, key, default) is not expected:
            raise InputRefused(
                f"config.json: {where}.{key} is {not expected}; only {expected} is known"
            )
    hidden = count(decoder, "n_embd", 768, where)
    heads = count(decoder, "n_head", 12, where)
    if hidden % heads:
        raise InputRefused(
            f"config.json: {where} has hidden size {hidden} and {heads} heads; expected a multiple"
        )
    return Gpt2Spec(
        hidden_size=hidden,
        layers=count(decoder, "n_layer", 12, where),
        heads=heads,
        intermediate_size=count(decoder, "n_inner", 4 * hidden, where),
        vocab_size=count(decoder, "vocab_size", 50257, where),
        max_positions=count(decoder, "n_positions", 1024, where),
        norm_eps=positive(decoder, "layer_norm_epsilon", 1e-5, where),
        activation=choice(decoder, "activation_function", "gelu_new", ACTIVATIONS, where),
        prefix=prefix,
        head=head,
        tied=flag(decoder, "tie_word_embeddings", True),
    )
