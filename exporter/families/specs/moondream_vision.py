"""Moondream's vision part: a SigLIP tower, the joined grid of crops, a two-layer projection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused
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
from exporter.families.config import choice, count, positive
from exporter.families.images.overlap_crops import CropSettings, averages, stitch_index
from exporter.families.specs.layers import fused_block_shapes, linear_tensors

NAMES = VitNames("patch_emb", "blocks.", "attn.", "proj", "ln1", "ln2", fused="qkv", flat=True)
REGION = "not used: answers with points and boxes, which a caption has not"
# Rows and columns of crops of the graphs' examples.
EXAMPLES = ((1, 1), (1, 2), (2, 1))


@dataclass(frozen=True)
class RegionSpec:
    """Sizes of the part that answers with points and boxes; `prefix` is put before its names."""

    hidden_size: int
    coordinate_features: int
    coordinate_bins: int
    size_features: int
    size_bins: int
    inner_size: int
    prefix: str

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, none of which is used."""
        hidden, inner = self.hidden_size, self.inner_size
        yield self._unused("coord_features", 1, self.coordinate_features // 2)
        yield self._unused("size_features", 2, self.size_features // 2)
        layers = {
            "coord_encoder": (hidden, self.coordinate_features),
            "coord_decoder.fc1": (inner, hidden),
            "coord_decoder.fc2": (self.coordinate_bins, inner),
            "size_encoder": (hidden, self.size_features),
            "size_decoder.fc1": (inner, hidden),
            "size_decoder.fc2": (self.size_bins, inner),
        }
        for name, shape in layers.items():
            yield self._unused(f"{name}.weight", *shape)
            yield self._unused(f"{name}.bias", shape[0])

    def _unused(self, name: str, *shape: int) -> TensorSpec:
        return TensorSpec(self.prefix + name, shape, reason=REGION, used=False)


@dataclass(frozen=True)
class MoondreamVision(VitSpec):
    """Tower, projection and crops of one model.

    Its blocks have ``ln1``, ``attn.qkv``, ``attn.proj``, ``ln2``, ``mlp.fc1`` and ``mlp.fc2``.
    `inner_size` is the width between the projection's layers.
    """

    output_size: int
    inner_size: int
    margin: int
    max_crops: int
    region: RegionSpec

    @property
    def tokens(self) -> int:
        """Rows of features per image, whatever its crops."""
        return self.patches**2

    @property
    def crops(self) -> CropSettings:
        """How an image is cut."""
        return CropSettings(self.image_size, self.patch_size, self.margin, self.max_crops)

    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each matrix of a block by its name within the block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return fused_block_shapes(hidden, inner, "attn.qkv", "attn.proj")

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower and projection, and of the region part, which no graph takes."""
        at, hidden = self.prefix, self.hidden_size
        yield TensorSpec(at + "patch_emb.weight", (hidden, 3 * self.patch_size**2), reason=PATCHES)
        yield TensorSpec(at + "patch_emb.bias", (hidden,), reason=BIAS)
        yield TensorSpec(at + "pos_emb", (1, self.tokens, hidden), reason=POSITIONS)
        for i in range(self.layers):
            block = f"{at}blocks.{i}."
            yield from norm_tensors(block + "ln1", hidden)
            yield from norm_tensors(block + "ln2", hidden)
            for name, shape in self.block_shapes().items():
                yield from linear_tensors(block + name, *shape, "vision")
        yield from norm_tensors(at + "post_ln", hidden)
        layers = {"fc1": (self.inner_size, 2 * hidden), "fc2": (self.output_size, self.inner_size)}
        for name, shape in layers.items():
            yield from linear_tensors(f"{at}proj_mlp.{name}", *shape, "vision")
        yield from self.region.tensors()

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random crops of images of three shapes."""
        for rows, columns in EXAMPLES:
            yield random_feed(self, rows, columns, rng)


def random_feed(
    spec: MoondreamVision, rows: int, columns: int, rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Inputs of the vision graph with random pixels, for `rows` x `columns` crops."""
    side, index = spec.image_size, stitch_index(spec.crops, rows, columns)
    pixels = rng.uniform(-1, 1, (1, 1 + rows * columns, 3, side, side))
    return {
        "pixel_values": pixels.astype(np.float32),
        "stitch_index": index,
        "row_shares": averages(index.shape[0], spec.patches),
        "column_shares": averages(index.shape[1], spec.patches),
    }


def moondream_vision(config: Mapping[str, Any], *, prefix: str, region: str) -> MoondreamVision:
    """The vision part of a parsed config.json; `prefix` and `region` stand before the tensors' names.

    Raises `InputRefused` on a bad config.
    """
    where = "vision_config"
    vision, dims = config.get(where) or {}, config.get("region_config") or {}
    hidden = count(config.get("text_config") or {}, "hidden_size", 2048, "text_config")
    spec = MoondreamVision(
        hidden_size=count(vision, "hidden_size", 1152, where),
        layers=count(vision, "num_hidden_layers", 27, where),
        heads=count(vision, "num_attention_heads", 16, where),
        intermediate_size=count(vision, "intermediate_size", 4304, where),
        patch_size=count(vision, "patch_size", 14, where),
        image_size=count(vision, "image_size", 378, where),
        norm_eps=positive(vision, "layer_norm_eps", 1e-5, where),
        activation=choice(vision, "hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",), where),
        prefix=prefix,
        names=NAMES,
        output_size=hidden,
        inner_size=count(vision, "projection_inner_size", 8192, where),
        margin=count(vision, "overlap_margin", 4, where),
        max_crops=count(vision, "max_crops", 12, where),
        region=RegionSpec(
            hidden_size=hidden,
            coordinate_features=count(dims, "coordinate_features", 256, "region_config"),
            coordinate_bins=count(dims, "coordinate_bins", 1024, "region_config"),
            size_features=count(dims, "size_features", 512, "region_config"),
            size_bins=count(dims, "size_bins", 2048, "region_config"),
            inner_size=count(dims, "inner_size", 8192, "region_config"),
            prefix=region,
        ),
    )
    whole = spec.image_size % spec.patch_size == 0 and spec.hidden_size % spec.heads == 0
    if not whole or spec.crops.window < 1:
        raise InputRefused(
            f"config.json: {where} has crops of {spec.image_size} pixels in patches of "
            f"{spec.patch_size}, {spec.margin} of them overlapping on each side, and {spec.heads} heads "
            f"of {spec.hidden_size}; expected whole patches and heads, and patches between the margins"
        )
    return spec
