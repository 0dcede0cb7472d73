"""The two halves of a SigLIP model (arXiv 2303.15343): image tower with attention pooling, and text encoder.

Names and sizes are those of transformers' SiglipModel. Both halves are stacks of the same pre-norm
block; neither has a projection into the common space beside the head named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import (
    BIAS,
    PATCHES,
    POSITIONS,
    Feed,
    TensorSpec,
    VitSpec,
    block_tensors,
    norm_tensors,
)
from exporter.families.config import choice, count, flag, positive, section
from exporter.families.specs.clip import SCALE
from exporter.families.specs.examples import example_images
from exporter.families.specs.layers import attention_tensors, linear_tensors

# Defaults of SiglipVisionConfig and SiglipTextConfig.
BLOCK_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
IMAGE_SIZE, PATCH_SIZE, VOCABULARY, TEXT_LENGTH, NORM_EPS = 224, 16, 32000, 64, 1e-6
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new")
PROBE = "learned query: few bytes"
SCORE_BIAS = "bias of the score: one number"


@dataclass(frozen=True)
class SiglipImage:
    """A vision transformer without class token, whose rows one learned query summarises by attention.

    The summary goes through an MLP with a residual, and is the image's vector: as wide as the tower.
    """

    tower: VitSpec

    @property
    def rows(self) -> int:
        """Patches of one image."""
        return self.tower.patches**2

    @property
    def head(self) -> str:
        """Stem, with its dot, of the names of the pooling head."""
        return f"{self.tower.prefix}head."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and pooling head."""
        tower, at = self.tower, f"{self.tower.prefix}embeddings."
        hidden, inner, side = tower.hidden_size, tower.intermediate_size, tower.patch_size
        yield TensorSpec(f"{at}patch_embedding.weight", (hidden, 3, side, side), reason=PATCHES)
        yield TensorSpec(f"{at}patch_embedding.bias", (hidden,), reason=BIAS)
        yield TensorSpec(f"{at}position_embedding.weight", (self.rows, hidden), reason=POSITIONS)
        for layer in range(tower.layers):
            yield from block_tensors(f"{tower.prefix}{tower.names.blocks}{layer}.", hidden, inner)
        yield from norm_tensors(f"{tower.prefix}post_layernorm", hidden)
        yield TensorSpec(f"{self.head}probe", (1, 1, hidden), reason=PROBE)
        yield from attention_tensors(f"{self.head}attention", hidden, "vision")
        yield from norm_tensors(f"{self.head}layernorm", hidden)
        yield from linear_tensors(f"{self.head}mlp.fc1", inner, hidden, "vision")
        yield from linear_tensors(f"{self.head}mlp.fc2", hidden, inner, "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.tower.image_size, rng)


@dataclass(frozen=True)
class SiglipText:
    """A text encoder in which every position sees all others, padding too; the last state is projected.

    `block`: sizes and names of its blocks, which have no patches. `head`, `logit_scale` and
    `logit_bias` are whole names, the first without weight or bias.
    """

    block: VitSpec
    vocab_size: int
    max_positions: int
    output_size: int
    head: str
    logit_scale: str
    logit_bias: str

    @property
    def embedding(self) -> str:
        """The token embedding's whole name."""
        return f"{self.block.prefix}embeddings.token_embedding.weight"

    @property
    def positions(self) -> str:
        """The position embedding's whole name."""
        return f"{self.block.prefix}embeddings.position_embedding.weight"

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the encoder and its head, then scale and bias of the score."""
        block, hidden = self.block, self.block.hidden_size
        yield TensorSpec(self.embedding, (self.vocab_size, hidden), "embedding")
        yield TensorSpec(self.positions, (self.max_positions, hidden), reason=POSITIONS)
        for layer in range(block.layers):
            stem = f"{block.prefix}{block.names.blocks}{layer}."
            for tensor in block_tensors(stem, hidden, block.intermediate_size):
                yield replace(tensor, role="decoder") if tensor.role == "vision" else tensor
        yield from norm_tensors(f"{block.prefix}final_layer_norm", hidden)
        yield from linear_tensors(self.head, self.output_size, hidden, "decoder")
        yield TensorSpec(self.logit_scale, (1,), reason=SCALE)
        yield TensorSpec(self.logit_bias, (1,), reason=SCORE_BIAS)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tokens: one short text, and three as long as the model takes."""
        for texts, length in ((1, min(3, self.max_positions)), (3, self.max_positions)):
            yield {"input_ids": rng.integers(0, self.vocab_size, (texts, length))}


def siglip_image(config: Mapping[str, Any]) -> SiglipImage:
    """The image half of a parsed config.json. Raises `InputRefused` on a bad one."""
    where = "vision_config"
    vision = _section(config, where)
    side = count(vision, "image_size", IMAGE_SIZE, where)
    patch = count(vision, "patch_size", PATCH_SIZE, where)
    tower = _blocks(vision, where, "vision_model.", side, patch)
    channels = count(vision, "num_channels", 3, where)
    if channels != 3 or tower.patches < 1:
        raise InputRefused(
            f"config.json: {where} has {channels} channels and patches of {patch} in {side} pixels; "
            "expected 3 channels and at least one patch"
        )
    if not flag(vision, "vision_use_head", True):
        raise InputRefused(
            f"config.json: {where}.vision_use_head is false; expected the pooling head, without which "
            "an image has no vector"
        )
    return SiglipImage(tower)


def siglip_text(config: Mapping[str, Any]) -> SiglipText:
    """The text half of a parsed config.json. Raises `InputRefused` on a bad one."""
    where = "text_config"
    text = _section(config, where)
    # A text has no patches: its rows are its tokens.
    block = _blocks(text, where, "text_model.", 1, 1)
    size = count(text, "projection_size", block.hidden_size, where)
    width = siglip_image(config).tower.hidden_size
    if size != width:
        raise InputRefused(
            f"config.json: texts become vectors of {size} ({where}.projection_size), images of {width} "
            "(vision_config.hidden_size); expected the same size"
        )
    return SiglipText(
        block=block,
        vocab_size=count(text, "vocab_size", VOCABULARY, where),
        max_positions=count(text, "max_position_embeddings", TEXT_LENGTH, where),
        output_size=size,
        head="text_model.head",
        logit_scale="logit_scale",
        logit_bias="logit_bias",
    )


def _blocks(part: Mapping[str, Any], where: str, prefix: str, side: int, patch: int) -> VitSpec:
    """Sizes of one half's blocks."""
    sizes = {key: count(part, key, default, where) for key, default in BLOCK_SIZES.items()}
    blocks = VitSpec(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        patch_size=patch,
        image_size=side,
        norm_eps=positive(part, "layer_norm_eps", NORM_EPS, where),
        activation=choice(part, "hidden_act", ACTIVATIONS[0], ACTIVATIONS, where),
        prefix=prefix,
    )
    if blocks.hidden_size % blocks.heads:
        raise InputRefused(
            f"config.json: {where} has hidden size {blocks.hidden_size} and {blocks.heads} heads; "
            "expected heads that divide it"
        )
    return blocks


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The part `key` of a config.json, empty where it has none. Raises `InputRefused`."""
    return {} if config.get(key) is None else section(config, key)
