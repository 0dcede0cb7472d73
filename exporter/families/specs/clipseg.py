"""CLIPSeg (arXiv 2112.10003) as three graphs: its sizes, its tensors, and how a config.json says them.

The image tower gives the states behind a few of its blocks; a small transformer of its own reads them,
modulated by the text's embedding, and draws the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import (
    BIAS,
    Feed,
    TensorSpec,
    VitNames,
    VitSpec,
    block_tensors,
)
from exporter.families.config import count, flag
from exporter.families.specs.clip import (
    PROJECTION_SIZE,
    ClipText,
    clip_section,
    clip_text,
)
from exporter.families.specs.clip_tower import VISION_SIZES, ClipTower, clip_tower

CLIP, DECODER = "clip.", "decoder."
EXTRACT = (3, 6, 9)
NAMES = VitNames(blocks="layers.")
REDUCED = "few bytes: every value of the mask passes through it"
CONVOLUTION = "convolution of the mask: few bytes"
UNUSED_SCALE = "not used: nothing is classified"
UNUSED_VISUAL = "not used: masks are asked for by text"


def state_names(count: int) -> tuple[str, ...]:
    """Names of the states that an image tower gives and a mask decoder reads."""
    return tuple(f"activations.{i}" for i in range(count))


@dataclass(frozen=True)
class ClipStates:
    """The image tower up to the last block whose states are read; `extract`: those blocks, from 0.

    Images may be of any size in whole patches: positions are interpolated to it.
    """

    tower: ClipTower
    extract: tuple[int, ...]
    projection: str
    output_size: int
    logit_scale: str

    def outputs(self) -> tuple[str, ...]:
        """Names of the states that the graph gives, in the order of `extract`."""
        return state_names(len(self.extract))

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the tower, and what only CLIP itself needs."""
        yield from self.tower.tensors(post_norm=False)
        unused = {
            self.projection: ((self.output_size, self.tower.hidden_size), UNUSED_VISUAL),
            self.logit_scale: ((), UNUSED_SCALE),
        }
        for name, (shape, reason) in unused.items():
            yield TensorSpec(name, shape, reason=reason, used=False)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images: one as large as the tower's own, and two larger ones."""
        side = self.tower.image_size
        for images, edge in ((1, side), (2, side + 2 * self.tower.patch_size)):
            pixels = rng.uniform(-1, 1, (images, 3, edge, edge)).astype(np.float32)
            yield {"pixel_values": pixels}


@dataclass(frozen=True)
class MaskDecoder:
    """A post-norm transformer over reduced states, a text's factors and terms, and convolutions.

    `blocks`: its sizes and the names of its blocks' parts. `conditional`: the block whose input the
    text modulates (FiLM, arXiv 1709.07871). `complex`: a convolution and two transposed ones instead
    of one.
    """

    blocks: VitSpec
    state_size: int
    text_size: int
    conditional: int
    complex: bool

    def inputs(self) -> tuple[str, ...]:
        """Names of the states, the shallowest first."""
        return state_names(self.blocks.layers)

    @property
    def reduce(self) -> str:
        """Stem of the layers that bring the states to the decoder's width."""
        return f"{self.blocks.prefix}reduces."

    @property
    def convolution(self) -> str:
        """Stem of the convolutions."""
        return f"{self.blocks.prefix}transposed_convolution"

    def convolutions(self) -> tuple[tuple[str, tuple[int, int, int, int], bool], ...]:
        """Name, kernel ``[inputs, outputs, side, side]`` and transposed or not, in the order of use.

        A kernel that is not transposed is ``[outputs, inputs, side, side]``.
        """
        size, patch, name = self.blocks.hidden_size, self.blocks.patch_size, self.convolution
        if not self.complex:
            return ((name, (size, 1, patch, patch), True),)
        side = patch // 4
        return (
            (f"{name}.0", (size, size, 3, 3), False),
            (f"{name}.2", (size, size // 2, side, side), True),
            (f"{name}.4", (size // 2, 1, side, side), True),
        )

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of the decoder."""
        size, at = self.blocks.hidden_size, self.blocks.prefix
        layers = {f"{at}film_{part}": self.text_size for part in ("mul", "add")}
        reduced = [f"{self.reduce}{i}" for i in range(self.blocks.layers)]
        layers |= dict.fromkeys(reduced, self.state_size)
        for name, width in layers.items():
            yield TensorSpec(f"{name}.weight", (size, width), reason=REDUCED)
            yield TensorSpec(f"{name}.bias", (size,), reason=BIAS)
        for i in range(self.blocks.layers):
            layer = f"{at}{self.blocks.names.blocks}{i}."
            yield from block_tensors(layer, size, self.blocks.intermediate_size)
        for name, shape, turned in self.convolutions():
            yield TensorSpec(f"{name}.weight", shape, reason=CONVOLUTION)
            yield TensorSpec(f"{name}.bias", (shape[1 if turned else 0],), reason=BIAS)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random states of one image, for one text and for three."""
        for texts, side in ((1, 3), (3, self.blocks.patches)):
            shape = (1, side**2 + 1, self.state_size)
            feed = {n: rng.standard_normal(shape, np.float32) for n in self.inputs()}
            feed["text_embeds"] = rng.standard_normal((texts, self.text_size), np.float32)
            yield feed


def extracted(config: Mapping[str, Any], depth: int) -> tuple[int, ...]:
    """The blocks whose states are read, of a tower of `depth`. Raises `InputRefused`."""
    layers = config.get("extract_layers") or EXTRACT
    known = isinstance(layers, (list, tuple)) and all(type(i) is int for i in layers)
    if not known or len(set(layers)) < len(layers) or not 0 <= min(layers) <= max(layers) < depth:
        raise InputRefused(
            f"config.json: extract_layers is {layers!r}; expected different blocks of the tower's "
            f"{depth}, counted from 0"
        )
    return tuple(layers)


def states_spec(config: Mapping[str, Any]) -> ClipStates:
    """The image part of a parsed config.json. Raises `InputRefused` on a bad one."""
    vision = clip_section(config, "vision_config")
    depth = count(vision, "num_hidden_layers", VISION_SIZES["num_hidden_layers"], "vision_config")
    layers = extracted(config, depth)
    at = f"{CLIP}vision_model."
    tower = clip_tower(vision, at, defaults=VISION_SIZES, feature_layer=max(layers) + 1)
    return ClipStates(
        tower,
        layers,
        f"{CLIP}visual_projection.weight",
        count(config, "projection_dim", PROJECTION_SIZE, "config"),
        f"{CLIP}logit_scale",
    )


def text_spec(config: Mapping[str, Any]) -> ClipText:
    """The text part of a parsed config.json. Raises `InputRefused` on a bad one."""
    return replace(clip_text(config, CLIP), logit_scale="")


def mask_spec(config: Mapping[str, Any]) -> MaskDecoder:
    """The decoder of a parsed config.json, with CLIPSegConfig's defaults. Raises `InputRefused`."""
    states = states_spec(config)
    layers = len(states.extract)
    return mask_decoder(config, states.tower, layers, states.output_size, states.tower.norm_eps)


def mask_decoder(
    config: Mapping[str, Any], tower: VitSpec, layers: int, text_size: int, norm_eps: float
) -> MaskDecoder:
    """The decoder of a config.json over `layers` states of `tower`. Raises `InputRefused`."""
    where = "config"
    blocks = VitSpec(
        hidden_size=count(config, "reduce_dim", 64, where),
        layers=layers,
        heads=count(config, "decoder_num_attention_heads", 4, where),
        intermediate_size=count(config, "decoder_intermediate_size", 2048, where),
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        norm_eps=norm_eps,
        # transformers' decoder does not read decoder_hidden_act.
        activation="relu",
        prefix=DECODER,
        names=NAMES,
    )
    conditional = config.get("conditional_layer")
    conditional = 0 if conditional is None else conditional
    if type(conditional) is not int or not 0 <= conditional < layers:
        raise InputRefused(
            f"config.json: conditional_layer is {conditional!r}; expected one of the decoder's {layers} "
            "blocks, counted from 0"
        )
    wide = flag(config, "use_complex_transposed_convolution", False)
    if blocks.hidden_size % blocks.heads or (wide and blocks.patch_size < 4):
        raise InputRefused(
            f"config.json: reduce_dim {blocks.hidden_size}, {blocks.heads} decoder heads and patches of "
            f"{blocks.patch_size}; expected a reduce_dim divisible by the heads and, for the complex "
            "convolution, patches of 4 pixels at least"
        )
    return MaskDecoder(blocks, tower.hidden_size, text_size, conditional, wide)
