"""The CLIP vision transformer: which tensors it has, and which of them a feature layer needs.

Published in LLaVA checkpoints (arXiv 2304.08485) and as the image half of CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.core.errors import InputRefused
from exporter.families.base import (
    PATCHES,
    POSITIONS,
    TensorSpec,
    VitSpec,
    block_tensors,
    norm_tensors,
)
from exporter.families.config import choice, count, positive
from exporter.families.specs.layers import CLASS_TOKEN

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
UNUSED = "not used: features are taken before it"
# What CLIPVisionConfig puts where vision_config has no key.
VISION_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}


@dataclass(frozen=True)
class ClipTower(VitSpec):
    """A CLIP vision transformer, of which `used_layers` blocks are computed.

    A class token stands before the patches' rows; a norm comes before the first block. The norm
    behind the last block is there, and not used when blocks are taken off (or hidden states asked
    for, which are taken before it).
    """

    used_layers: int

    @property
    def rows(self) -> int:
        """Rows of hidden states per tile: class token and patches."""
        return self.patches**2 + 1

    def tensors(self, *, post_norm: bool) -> Iterator[TensorSpec]:
        """Every tensor of the checkpoint's tower; `post_norm` says that its last norm is used."""
        hidden = self.hidden_size
        at, side = f"{self.prefix}embeddings.", self.patch_size
        yield TensorSpec(at + "class_embedding", (hidden,), reason=CLASS_TOKEN)
        yield TensorSpec(at + "patch_embedding.weight", (hidden, 3, side, side), reason=PATCHES)
        yield TensorSpec(at + "position_embedding.weight", (self.rows, hidden), reason=POSITIONS)
        # The published name of the norm before the blocks is misspelt.
        yield from norm_tensors(self.prefix + "pre_layrnorm", hidden)
        for i in range(self.layers):
            layer = f"{self.prefix}encoder.layers.{i}."
            for tensor in block_tensors(layer, hidden, self.intermediate_size):
                yield tensor if i < self.used_layers else unused(tensor)
        for tensor in norm_tensors(self.prefix + "post_layernorm", hidden):
            yield tensor if post_norm else unused(tensor)


def unused(tensor: TensorSpec) -> TensorSpec:
    """The same tensor, which no graph takes."""
    return replace(tensor, role="float", reason=UNUSED, used=False)


def clip_tower(
    vision: Mapping[str, Any],
    prefix: str,
    *,
    defaults: Mapping[str, int],
    feature_layer: int,
    where: str = "vision_config",
) -> ClipTower:
    """The tower of the vision part `vision` of a config.json, whose absent sizes are in `defaults`.

    `feature_layer` counts hidden states as transformers does: 0 before the first block, -1 behind
    the last. Raises `InputRefused` on a bad config.
    """
    sizes = {key: count(vision, key, default, where) for key, default in defaults.items()}
    layers, heads = sizes["num_hidden_layers"], sizes["num_attention_heads"]
    used = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= used <= layers:
        raise InputRefused(
            f"config.json: vision_feature_layer is {feature_layer} of a tower of {layers} blocks; "
            f"expected the states behind one of them, {-layers} to -1"
        )
    spec = ClipTower(
        hidden_size=sizes["hidden_size"],
        layers=layers,
        heads=heads,
        intermediate_size=sizes["intermediate_size"],
        patch_size=sizes["patch_size"],
        image_size=sizes["image_size"],
        norm_eps=positive(vision, "layer_norm_eps", 1e-5, where),
        activation=choice(vision, "hidden_act", ACTIVATIONS[0], ACTIVATIONS, where),
        prefix=prefix,
        used_layers=used,
    )
    channels = count(vision, "num_channels", 3, where)
    if channels != 3 or spec.hidden_size % heads or spec.image_size < spec.patch_size:
        raise InputRefused(
            f"config.json: {where} has {channels} channels, hidden size {spec.hidden_size}, {heads} heads "
            f"and patches of {spec.patch_size} in {spec.image_size} pixels; expected 3 channels, a hidden "
            "size divisible by the heads and at least one patch"
        )
    return spec
