"""Random images as example inputs of vision graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from exporter.families.base import Feed


def example_images(side: int, rng: np.random.Generator) -> Iterator[Feed]:
    """Square images ``[batch, 3, side, side]``, alone and in a batch of two."""
    for batch in (1, 2):
        pixels = rng.uniform(-1, 1, (batch, 3, side, side))
        yield {"pixel_values": pixels.astype(np.float32)}


def example_tiles(side: int, rng: np.random.Generator) -> Iterator[Feed]:
    """The same as images of one tile, ``[batch, 1, 3, side, side]``."""
    for feed in example_images(side, rng):
        yield {"pixel_values": feed["pixel_values"][:, None]}
