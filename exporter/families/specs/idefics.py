"""IDEFICS' parts (arXiv 2306.16527): a Llama with gated cross-attention, a perceiver resampler, a CLIP tower.

The decoder is frozen Llama blocks with a gated block before every few of them, as in Flamingo (arXiv
2204.14198). The image is resampled once, to as many rows for any image; keys and values of all gated
blocks follow from these rows alone, so that they belong to the vision part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.families.base import NORM, DecoderSpec, Feed, TensorSpec, norm_tensors
from exporter.families.specs.clip_tower import ClipTower
from exporter.families.specs.decoder import example_texts

ADDED = "rows of tokens added to Llama's: few bytes"
ALPHA = "gate: one number or one row, large effect"
LATENTS = "learned queries: few bytes, the same for every image"


@dataclass(frozen=True)
class GatedLlama:
    """A Llama decoder with a gated cross-attention block before every `interval`-th of its blocks.

    `llama` leaves its head to this (`tied` is true in it). `added`: tokens whose rows in embedding
    and head are matrices of their own. `latents`: rows that an image has. `image_width`: their width.
    `qk_norms`: whether queries and keys of the gated blocks are normalised per head. `alpha`: shape
    of a gate.
    """

    llama: DecoderSpec
    interval: int
    added: int
    latents: int
    image_width: int
    qk_norms: bool
    alpha: tuple[int, ...]
    tied: bool = False

    @property
    def hidden_size(self) -> int:
        """Width of an embedding and of a hidden state."""
        return self.llama.hidden_size

    @property
    def layers(self) -> int:
        """Llama blocks: a gated block keeps nothing of the text."""
        return self.llama.layers

    @property
    def heads(self) -> int:
        """Heads of the queries, in both kinds of block."""
        return self.llama.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.llama.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.llama.head_dim

    @property
    def vocab_size(self) -> int:
        """All tokens, the added ones last."""
        return self.llama.vocab_size + self.added

    @property
    def max_positions(self) -> int:
        """Positions of prompt and answer together."""
        return self.llama.max_positions

    @property
    def embedding(self) -> str:
        """Name of the embedding without the added rows."""
        return self.llama.embedding

    @property
    def head(self) -> str:
        """Name of the head without the added rows."""
        return self.llama.head

    @property
    def added_embedding(self) -> str:
        """Name of the embedding's added rows."""
        return f"{self.embedding.removesuffix('weight')}additional_embedding.weight"

    @property
    def added_head(self) -> str:
        """Name of the head's added rows."""
        return f"{self.head.removesuffix('weight')}additional_fc.weight"

    @property
    def gated_blocks(self) -> int:
        """Number of gated blocks."""
        return self.layers // self.interval

    def gated(self, block: int) -> str:
        """What the names of a gated block's tensors begin with."""
        return f"{self.llama.prefix}gated_cross_attn_layers.{block}."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has, but those of `image_tensors`."""
        hidden = self.hidden_size
        yield from self.llama.tensors()
        for block in range(self.gated_blocks):
            yield from self._gated_tensors(self.gated(block))
        if self.added:
            for name in (self.added_embedding, self.added_head):
                yield TensorSpec(name, (self.added, hidden), reason=ADDED)
        if not self.tied:
            yield TensorSpec(self.head, (self.llama.vocab_size, hidden), "head")

    def image_tensors(self) -> Iterator[TensorSpec]:
        """The tensors of the gated blocks that see nothing but the image."""
        for block in range(self.gated_blocks):
            at = f"{self.gated(block)}cross_attn."
            for part in "kv":
                shape = (self.hidden_size, self.image_width)
                yield TensorSpec(f"{at}{part}_proj.weight", shape, "vision")
            if self.qk_norms:
                yield TensorSpec(f"{at}k_layer_norm.weight", (self.head_dim,), reason=NORM)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random inputs of the graph at two shapes, with one image and with two."""
        for images, (batch, length, _, feed) in enumerate(example_texts(self, rng), start=1):
            shape = (batch, self.heads, images * self.latents, self.head_dim)
            for name in gated_names(self):
                feed[name] = rng.standard_normal(shape, np.float32)
            feed["image_attention_mask"] = rng.integers(0, 2, (batch, length, images))
            yield feed

    def _gated_tensors(self, at: str) -> Iterator[TensorSpec]:
        hidden = self.hidden_size
        shapes = {n: s for n, s in self.llama.matrix_shapes().items() if n.startswith("mlp.")}
        for part in ("cross_attn", "dense"):
            yield TensorSpec(f"{at}alpha_{part}", self.alpha, reason=ALPHA)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield TensorSpec(f"{at}{norm}.weight", (hidden,), reason=NORM)
        for part in ("q_proj", "o_proj"):
            yield TensorSpec(f"{at}cross_attn.{part}.weight", (hidden, hidden), "decoder")
        if self.qk_norms:
            yield TensorSpec(f"{at}cross_attn.q_layer_norm.weight", (self.head_dim,), reason=NORM)
        for name, shape in shapes.items():
            yield TensorSpec(f"{at}{name}.weight", shape, "decoder")


def gated_names(decoder: GatedLlama) -> list[str]:
    """Outputs of the vision graph and inputs of the decoder graph: the images as its blocks see them."""
    blocks = range(decoder.gated_blocks)
    return [f"cross_key_values.{i}.{part}" for i in blocks for part in ("key", "value")]


@dataclass(frozen=True)
class Perceiver:
    """A perceiver resampler: `latents` learned rows that look at an image's rows, `depth` times.

    `width` is that of the image's rows and of its own, `inner` that of the MLPs. `prefix` is put
    before ``latents``, ``blocks.{i}`` and ``layer_norm``.
    """

    width: int
    inner: int
    depth: int
    heads: int
    head_dim: int
    latents: int
    qk_norms: bool
    prefix: str

    @property
    def norms(self) -> tuple[str, ...]:
        """Norms per head of its attention."""
        return ("q_layer_norm", "k_layer_norm") if self.qk_norms else ()

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor it has."""
        width, inside = self.width, self.heads * self.head_dim
        yield TensorSpec(f"{self.prefix}latents", (self.latents, width), reason=LATENTS)
        for block in range(self.depth):
            at = f"{self.prefix}blocks.{block}."
            for norm in ("0.context_layer_norm", "0.latents_layer_norm", "1.ln"):
                yield from norm_tensors(at + norm, width)
            for norm in self.norms:
                yield from norm_tensors(f"{at}0.{norm}", self.head_dim)
            for part in "qkv":
                yield TensorSpec(f"{at}0.{part}_proj.weight", (inside, width), "vision")
            yield TensorSpec(f"{at}0.output_proj.weight", (width, inside), "vision")
            yield TensorSpec(f"{at}1.fc.weight", (self.inner, width), "vision")
            yield TensorSpec(f"{at}1.c_proj.weight", (width, self.inner), "vision")
        yield from norm_tensors(f"{self.prefix}layer_norm", width)


@dataclass(frozen=True)
class ResampledVision:
    """A CLIP tower with all that turns its rows into a decoder's cross keys and values."""

    tower: ClipTower
    perceiver: Perceiver
    decoder: GatedLlama

    @property
    def output_size(self) -> int:
        """Width of keys, and of values, of one gated block."""
        return self.decoder.hidden_size

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower, perceiver and cross keys and values."""
        yield from self.tower.tensors(post_norm=False)
        yield from self.perceiver.tensors()
        yield from self.decoder.image_tensors()

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images: one, and two in each text of a batch of two."""
        side = self.tower.image_size
        for count in (1, 2):
            shape = (count, count, 3, side, side)
            yield {"pixel_values": rng.uniform(-1, 1, shape).astype(np.float32)}
