"""timm's vision transformer (arXiv 2010.11929), whose class token is projected into a common space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.families.base import (
    Feed,
    TensorSpec,
    VitNames,
    VitSpec,
    norm_tensors,
)
from exporter.families.specs.examples import example_images
from exporter.families.specs.layers import (
    class_token_and_patch_tensors,
    fused_block_shapes,
    linear_tensors,
)

NAMES = VitNames(
    patch="patch_embed.proj",
    blocks="blocks.",
    attention="attn.",
    out="proj",
    first_norm="norm1",
    second_norm="norm2",
    fused="qkv",
)


@dataclass(frozen=True)
class TimmImage:
    """A vision transformer with timm's names behind its tower's prefix, and one matrix without bias.

    `projection` is a whole tensor name.
    """

    tower: VitSpec
    projection: str
    output_size: int

    @property
    def rows(self) -> int:
        """Class token and patches."""
        return self.tower.patches**2 + 1

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projection."""
        tower = self.tower
        at, hidden, inner = tower.prefix, tower.hidden_size, tower.intermediate_size
        yield from class_token_and_patch_tensors(f"{at}cls_token", f"{at}pos_embed", tower)
        shapes = fused_block_shapes(hidden, inner, "attn.qkv", "attn.proj")
        for layer in range(tower.layers):
            block = f"{at}{NAMES.blocks}{layer}."
            yield from norm_tensors(block + NAMES.first_norm, hidden)
            yield from norm_tensors(block + NAMES.second_norm, hidden)
            for name, shape in shapes.items():
                yield from linear_tensors(block + name, *shape, "vision")
        yield from norm_tensors(f"{at}norm", hidden)
        yield TensorSpec(self.projection, (self.output_size, hidden), "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.tower.image_size, rng)
