"""T5 (arXiv 1910.10683) as two graphs: sizes, tensors, and how a config.json says them.

The first graph gives what every decoder layer's cross-attention makes of the text, so that it is
computed once; the second one decodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
from exporter.families.base import NORM, Feed, TensorSpec
from exporter.families.config import choice, count, flag, positive
from exporter.families.specs.gpt2 import cross_names

DISTANCES = "table of relative positions: added to scores, few bytes"
# Stood in older checkpoints and was never read: other blocks' cross-attention has none either.
STRAY = "not used: cross-attention has no distances"
LEFT_OUT = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias": STRAY}
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
# feed_forward_proj to (gated, activation), as transformers reads it.
FEED_FORWARD = {"relu": (False, "relu"), "gated-gelu": (True, "gelu_new")}
EXAMPLE_LENGTH = 7


@dataclass(frozen=True)
class T5Sizes:
    """Sizes of one T5, in elements; `encoder_layers` and `decoder_layers` in blocks.

    `scaled`: hidden states are multiplied with ``hidden_size ** -0.5`` before the head. `tied`: the
    head is the embedding. These are two things: T5 1.1 has neither, and its derivatives may have one.
    """

    hidden_size: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    buckets: int
    max_distance: int
    gated: bool
    activation: str
    tied: bool
    scaled: bool

    @property
    def inner(self) -> int:
        """Width of all heads together, which is not always the hidden size."""
        return self.heads * self.head_dim

    @property
    def embedding(self) -> TensorSpec:
        """The table that both graphs look tokens up in."""
        return TensorSpec(EMBEDDING, (self.vocab_size, self.hidden_size), "embedding")

    @property
    def head(self) -> TensorSpec:
        """The head where it is a matrix of its own."""
        return TensorSpec(HEAD, (self.vocab_size, self.hidden_size), "head")

    def attention_tensors(self, name: str, parts: str = "qkvo") -> Iterator[TensorSpec]:
        """Matrices of the attention called `name` (with its dot); `parts` of queries, keys, ..."""
        for part in parts:
            shape = (self.inner, self.hidden_size)
            yield TensorSpec(
                f"{name}{part}.weight", shape[::-1] if part == "o" else shape, "decoder"
            )

    def layer_tensors(self, layer: str) -> Iterator[TensorSpec]:
        """The feed-forward layer called `layer` (with its dot), with its norm."""
        wide = (self.intermediate_size, self.hidden_size)
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            yield TensorSpec(f"{layer}DenseReluDense.{name}.weight", wide, "decoder")
        yield TensorSpec(f"{layer}DenseReluDense.wo.weight", wide[::-1], "decoder")
        yield self.norm(layer + "layer_norm")

    def norm(self, name: str) -> TensorSpec:
        """Weight of the RMS norm called `name`, which has no bias."""
        return TensorSpec(f"{name}.weight", (self.hidden_size,), reason=NORM)

    def self_attention_tensors(self, block: str, first: bool) -> Iterator[TensorSpec]:
        """Self-attention of a block (with its dot); the `first` one has the distances of all."""
        yield self.norm(f"{block}layer.0.layer_norm")
        yield from self.attention_tensors(f"{block}layer.0.SelfAttention.")
        if first:
            yield self.distances(block)

    def distances(self, block: str) -> TensorSpec:
        """The table of a bias by bucket of distance and head."""
        name = f"{block}layer.0.SelfAttention.relative_attention_bias.weight"
        return TensorSpec(name, (self.buckets, self.heads), reason=DISTANCES)

    def cross(self, layer: int) -> str:
        """What the names of a decoder block's cross-attention begin with."""
        return f"decoder.block.{layer}.layer.1.EncDecAttention."


@dataclass(frozen=True)
class T5Encoder:
    """The encoder, and the keys and values that each decoder layer takes from it."""

    sizes: T5Sizes

    def tensors(self) -> Iterator[TensorSpec]:
        """The embedding first."""
        sizes = self.sizes
        yield sizes.embedding
        for i in range(sizes.encoder_layers):
            block = f"encoder.block.{i}."
            yield from sizes.self_attention_tensors(block, i == 0)
            yield from sizes.layer_tensors(f"{block}layer.1.")
        yield sizes.norm("encoder.final_layer_norm")
        for i in range(sizes.decoder_layers):
            yield from sizes.attention_tensors(sizes.cross(i), "kv")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """One text, and two of which one is padded."""
        for batch, length in ((1, EXAMPLE_LENGTH), (2, EXAMPLE_LENGTH + 4)):
            mask = np.ones((batch, length), np.int64)
            mask[-1, length - 2 * (batch - 1) :] = 0
            ids = rng.integers(0, self.sizes.vocab_size, (batch, length))
            yield {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class T5Decoder:
    """The decoder with its head."""

    sizes: T5Sizes

    def tensors(self) -> Iterator[TensorSpec]:
        """The embedding first, the head (unless tied) last."""
        sizes = self.sizes
        yield sizes.embedding
        for i in range(sizes.decoder_layers):
            block = f"decoder.block.{i}."
            yield from sizes.self_attention_tensors(block, i == 0)
            yield sizes.norm(f"{block}layer.1.layer_norm")
            yield from sizes.attention_tensors(sizes.cross(i), "qo")
            yield from sizes.layer_tensors(f"{block}layer.2.")
        yield sizes.norm("decoder.final_layer_norm")
        if not sizes.tied:
            yield sizes.head

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """The beginning of a text, and one token behind three in a batch of two, one text padded."""
        sizes, layers = self.sizes, range(self.sizes.decoder_layers)
        for batch, length, past, keep in ((1, 4, 0, 0), (2, 1, 3, 1)):
            mask = np.ones((batch, EXAMPLE_LENGTH), np.int64)
            mask[-1, EXAMPLE_LENGTH - 2 * (batch - 1) :] = 0
            feed: dict[str, NDArray[Any]] = {
                "input_ids": rng.integers(0, sizes.vocab_size, (batch, length)),
                "encoder_attention_mask": mask,
                "num_logits_to_keep": np.array(keep, np.int64),
            }
            own = [f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value")]
            rows = dict.fromkeys(own, past) | dict.fromkeys(
                cross_names(sizes.decoder_layers), EXAMPLE_LENGTH
            )
            for name, count_ in rows.items():
                shape = (batch, sizes.heads, count_, sizes.head_dim)
                feed[name] = rng.standard_normal(shape, np.float32)
            yield feed


def t5_sizes(config: Mapping[str, Any]) -> T5Sizes:
    """Sizes of a parsed config.json, with T5Config's defaults. Raises `InputRefused`.

    Whether the hidden states are scaled follows ``tie_word_embeddings``, as in transformers, which
    ties T5 always and keeps what the flag meant under ``scale_decoder_outputs``.
    """
    where = "config"
    layers = count(config, "num_layers", 6, where)
    kind = choice(config, "feed_forward_proj", "relu", tuple(FEED_FORWARD), where)
    gated, activation = FEED_FORWARD[kind]
    for key, value in (("is_gated_act", gated), ("dense_act_fn", activation)):
        if config.get(key) not in (None, value):
            raise InputRefused(
                f"config.json: {key} is {config[key]!r} and feed_forward_proj {kind!r}; expected "
                f"{value!r}"
            )
    tied = flag(config, "tie_word_embeddings", True)
    sizes = T5Sizes(
        hidden_size=count(config, "d_model", 512, where),
        encoder_layers=layers,
        decoder_layers=count(config, "num_decoder_layers", layers, where),
        heads=count(config, "num_heads", 8, where),
        head_dim=count(config, "d_kv", 64, where),
        intermediate_size=count(config, "d_ff", 2048, where),
        vocab_size=count(config, "vocab_size", 32128, where),
        norm_eps=positive(config, "layer_norm_epsilon", 1e-6, where),
        buckets=count(config, "relative_attention_num_buckets", 32, where),
        max_distance=count(config, "relative_attention_max_distance", 128, where),
        gated=gated,
        activation=activation,
        tied=tied,
        scaled=flag(config, "scale_decoder_outputs", tied),
    )
    # Half of the buckets, in the encoder half of each direction's, are single distances.
    if sizes.buckets % 4 or sizes.max_distance <= sizes.buckets // 2:
        raise InputRefused(
            f"config.json: {sizes.buckets} buckets up to a distance of {sizes.max_distance}; expected a "
            "multiple of 4 buckets, and a distance above half of it"
        )
    return sizes


def newest_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with ``scale_decoder_outputs`` and ``tie_word_embeddings`` said apart.

    Published files say the first by the second, which a merge may change: a head that is stored on
    its own is not tied, and is scaled all the same. Raises `InputRefused`.
    """
    sizes = t5_sizes(config)
    said = {"scale_decoder_outputs": sizes.scaled, "tie_word_embeddings": sizes.tied}
    return {**config, **said}


def t5_copies(config: Mapping[str, Any]) -> dict[str, str]:
    """Names under which checkpoints hold the embedding once more; the head where it is tied."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    if flag(config, "tie_word_embeddings", True):
        names.append(HEAD)
    return dict.fromkeys(names, EMBEDDING)


def distance_buckets(
    distances: NDArray[np.int64], buckets: int, max_distance: int
) -> NDArray[np.int64]:
    """Bucket of each distance >= 0 of `buckets` in one direction (arXiv 1910.10683, section 2.1).

    The first half are single distances, the others grow with the logarithm up to `max_distance`. In
    float32 and in this order, as checkpoints were trained: at a bound a rounding decides.
    """
    exact = buckets // 2
    ratio = np.maximum(distances, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + steps.astype(np.int64), buckets - 1)
    return np.where(distances < exact, distances, far)


def bias_by_distance(
    table: NDArray[np.float32], max_distance: int, *, both: bool
) -> NDArray[np.float32]:
    """Rows of `table` ``[buckets, heads]`` by distance, beyond `max_distance` all the same.

    `both` (the encoder): row d is for a key d - max_distance places behind its query; otherwise row d
    for a key d places before it.
    """
    if not both:
        return table[distance_buckets(np.arange(max_distance + 1), len(table), max_distance)]
    half = len(table) // 2
    places = np.arange(-max_distance, max_distance + 1)
    rows = distance_buckets(np.abs(places), half, max_distance)
    return table[rows + np.where(places > 0, half, 0)]
