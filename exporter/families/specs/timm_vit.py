"""timm's vision transformer (arXiv 2010.11929), whose class token is projected into a common space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.families.base import (
    BIAS,
    PATCHES,
    POSITIONS,
    Feed,
    TensorSpec,
    VitNames,
    VitSpec,
    norm_tensors,
)
from exporter.families.specs.clip_tower import CLASS_TOKEN

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
        at, hidden, side = tower.prefix, tower.hidden_size, tower.patch_size
        yield TensorSpec(f"{at}cls_token", (1, 1, hidden), reason=CLASS_TOKEN)
        yield TensorSpec(f"{at}pos_embed", (1, self.rows, hidden), reason=POSITIONS)
        yield TensorSpec(f"{at}{NAMES.patch}.weight", (hidden, 3, side, side), reason=PATCHES)
        yield TensorSpec(f"{at}{NAMES.patch}.bias", (hidden,), reason=BIAS)
        inner = tower.intermediate_size
        shapes = {
            "attn.qkv": (3 * hidden, hidden),
            "attn.proj": (hidden, hidden),
            "mlp.fc1": (inner, hidden),
            "mlp.fc2": (hidden, inner),
        }
        for layer in range(tower.layers):
            block = f"{at}{NAMES.blocks}{layer}."
            yield from norm_tensors(block + NAMES.first_norm, hidden)
            yield from norm_tensors(block + NAMES.second_norm, hidden)
            for name, shape in shapes.items():
                yield TensorSpec(f"{block}{name}.weight", shape, "vision")
                yield TensorSpec(f"{block}{name}.bias", shape[:1], reason=BIAS)
        yield from norm_tensors(f"{at}norm", hidden)
        yield TensorSpec(self.projection, (self.output_size, hidden), "vision")

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random images, alone and in a batch of two."""
        return example_images(self.tower.image_size, rng)


def example_images(side: int, rng: np.random.Generator) -> Iterator[Feed]:
    """Random square images, alone and in a batch of two."""
    for batch in (1, 2):
        pixels = rng.uniform(-1, 1, (batch, 3, side, side))
        yield {"pixel_values": pixels.astype(np.float32)}
