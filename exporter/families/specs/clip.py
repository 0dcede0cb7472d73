"""The two halves of a CLIP model (arXiv 2103.00020): image tower and text transformer, each projected.

Names and sizes are those of transformers' CLIPModel; `clip_text` and `clip_image` take a prefix, so
that models that hold a CLIP inside themselves use the same specs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import POSITIONS, Feed, TensorSpec, block_tensors, norm_tensors
from exporter.families.config import choice, count, positive, section
from exporter.families.specs.clip_tower import ACTIVATIONS, VISION_SIZES, ClipTower, clip_tower
from exporter.families.specs.examples import example_images

SCALE = "temperature: one number"
# Defaults of CLIPTextConfig.
TEXT_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
PROJECTION_SIZE = 512
END = 49407
# Configs from before transformers 4.31 say 2, which is no end token: the highest id of a text is its
# end then.
LEGACY_END = 2


@dataclass(frozen=True)
class ClipText:
    """A causal pre-norm text transformer, whose state at the end token is projected.

    `prefix` is put before ``embeddings...``, ``encoder.layers.{i}...`` and ``final_layer_norm``;
    `projection` and `logit_scale` are whole tensor names, and without a `logit_scale` the graph has
    no such output. `end`: id of the end token, None where it is the highest id of a text.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    activation: str
    end: int | None
    prefix: str
    projection: str
    output_size: int
    logit_scale: str

    @property
    def embedding(self) -> str:
        """The token embedding's whole name."""
        return f"{self.prefix}embeddings.token_embedding.weight"

    @property
    def positions(self) -> str:
        """The position embedding's whole name."""
        return f"{self.prefix}embeddings.position_embedding.weight"

    def layer(self, index: int) -> str:
        """Stem, with its dot, of the names of block `index`."""
        return f"{self.prefix}encoder.layers.{index}."

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the text transformer, its projection and the temperature."""
        hidden = self.hidden_size
        yield TensorSpec(self.embedding, (self.vocab_size, hidden), "embedding")
        yield TensorSpec(self.positions, (self.max_positions, hidden), reason=POSITIONS)
        for i in range(self.layers):
            for tensor in block_tensors(self.layer(i), hidden, self.intermediate_size):
                yield replace(tensor, role="decoder") if tensor.role == "vision" else tensor
        yield from norm_tensors(f"{self.prefix}final_layer_norm", hidden)
        yield TensorSpec(self.projection, (self.output_size, hidden), "decoder")
        if self.logit_scale:
            yield TensorSpec(self.logit_scale, (), reason=SCALE)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tokens: one text, and three padded ones."""
        for texts, length in ((1, min(3, self.max_positions)), (3, self.max_positions)):
            ids = rng.integers(0, self.vocab_size, (texts, length))
            ids[:, -1] = self.vocab_size - 1 if self.end is None else self.end
            mask = np.ones((texts, length), np.int64)
            if texts > 1:
                ids[1, length // 2 :], mask[1, length // 2 + 1 :] = ids[0, -1], 0
            yield {"input_ids": ids, "attention_mask": mask}


@dataclass(frozen=True)
class ClipImage:
    """A CLIP vision transformer, whose class token is normed and projected to `output_size`."""

    tower: ClipTower
    projection: str
    output_size: int

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projection."""
        yield from self.tower.tensors(post_norm=True)
        yield TensorSpec(self.projection, (self.output_size, self.tower.hidden_size), "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.tower.image_size, rng)


def clip_text(config: Mapping[str, Any], prefix: str = "") -> ClipText:
    """The text half of a parsed config.json; all names begin with `prefix`. Raises `InputRefused`."""
    where = "text_config"
    text = clip_section(config, where)
    sizes = {key: count(text, key, default, where) for key, default in TEXT_SIZES.items()}
    end = count(text, "eos_token_id", END, where)
    spec = ClipText(
        hidden_size=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        vocab_size=sizes["vocab_size"],
        max_positions=sizes["max_position_embeddings"],
        norm_eps=positive(text, "layer_norm_eps", 1e-5, where),
        activation=choice(text, "hidden_act", ACTIVATIONS[0], ACTIVATIONS, where),
        end=None if end == LEGACY_END else end,
        prefix=f"{prefix}text_model.",
        projection=f"{prefix}text_projection.weight",
        output_size=count(config, "projection_dim", PROJECTION_SIZE, "config"),
        logit_scale=f"{prefix}logit_scale",
    )
    if spec.hidden_size % spec.heads or (spec.end or 0) >= spec.vocab_size:
        raise InputRefused(
            f"config.json: {where} has hidden size {spec.hidden_size}, {spec.heads} heads, {spec.vocab_size} "
            f"tokens and eos_token_id {end}; expected a hidden size divisible by the heads, and an end "
            "token among the tokens"
        )
    return spec


def clip_image(config: Mapping[str, Any], prefix: str = "") -> ClipImage:
    """The image half of a parsed config.json; all names begin with `prefix`. Raises `InputRefused`."""
    vision = clip_section(config, "vision_config")
    # All blocks; the norm behind the last of them is used.
    at = f"{prefix}vision_model."
    tower = clip_tower(vision, at, defaults=VISION_SIZES, feature_layer=-1)
    size = count(config, "projection_dim", PROJECTION_SIZE, "config")
    return ClipImage(tower, f"{prefix}visual_projection.weight", size)


def clip_section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The part `key` of a config.json, which as ``<key>_dict`` replaces it whole (an older form that
    transformers still prefers). Raises `InputRefused` when it is no object.
    """
    for name in (f"{key}_dict", key):
        if config.get(name) is not None:
            return section(config, name)
    return {}
