"""LLaVA's vision part: a CLIP tower, a two-layer projector, and LLaVA-NeXT's newline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.core.errors import InputRefused
from exporter.families.base import Feed, TensorSpec
from exporter.families.config import choice, count, flag, section
from exporter.families.specs.clip_tower import VISION_SIZES, ClipTower, clip_tower
from exporter.families.specs.layers import linear_tensors

# What LlavaConfig and LlavaNextConfig put where config.json has no vision_config (CLIP ViT-L/14, 336
# pixels).
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
NEWLINE = "model.image_newline"
NEWLINE_REASON = "newline between lines of features: few bytes, stands in the text"


@dataclass(frozen=True)
class LlavaVision:
    """Tower, projector and newline of one model.

    `class_token`: its row is kept (strategy "full"); `projector` is put before ``linear_1``;
    `newline` is a whole tensor name, empty for a family without one.
    """

    tower: ClipTower
    output_size: int
    class_token: bool
    projector: str
    projector_activation: str
    newline: str

    @property
    def tokens(self) -> int:
        """Rows of features per tile."""
        return self.tower.rows if self.class_token else self.tower.rows - 1

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor of tower, projector and newline."""
        inner, outer = self.tower.hidden_size, self.output_size
        yield from self.tower.tensors(post_norm=False)
        for name, columns in (("linear_1", inner), ("linear_2", outer)):
            yield from linear_tensors(f"{self.projector}{name}", outer, columns, "vision")
        if self.newline:
            yield TensorSpec(self.newline, (outer,), reason=NEWLINE_REASON)

    def example_feeds(self, rng: np.random.Generator) -> Iterator[Feed]:
        """Random tiles, one and three; with a newline also rows of them in any order."""
        side = self.tower.image_size
        for batch, tiles in ((1, 1), (1, 3)):
            shape = (batch, tiles, 3, side, side)
            feed: Feed = {"pixel_values": rng.uniform(-1, 1, shape).astype(np.float32)}
            if self.newline:
                last = tiles * self.tokens
                feed = {**feed, "feature_index": rng.integers(0, last + 1, 2 * tiles)}
            yield feed


def llava_vision(config: Mapping[str, Any], *, newline: bool) -> LlavaVision:
    """The vision part of a parsed config.json. Raises `InputRefused` on a bad config."""
    absent = config.get("vision_config") is None
    vision = LARGE if absent else section(config, "vision_config")
    choice(vision, "model_type", "clip_vision_model", ("clip_vision_model",), "vision_config")
    layer = config.get("vision_feature_layer")
    layer = -2 if layer is None else layer
    if type(layer) is not int:
        raise InputRefused(
            f"config.json: vision_feature_layer is {layer!r}; expected one layer, such as -2"
        )
    strategies = ("default",) if newline else ("default", "full")
    strategy = choice(config, "vision_feature_select_strategy", "default", strategies, "config")
    if not flag(config, "multimodal_projector_bias", True):
        raise InputRefused("config.json: multimodal_projector_bias is false; only true is known")
    return LlavaVision(
        tower=clip_tower(vision, TOWER, defaults=VISION_SIZES, feature_layer=layer),
        output_size=count(section(config, "text_config"), "hidden_size", 4096, "text_config"),
        class_token=strategy == "full",
        projector=PROJECTOR,
        projector_activation=choice(config, "projector_hidden_act", "gelu", ("gelu",), "config"),
        newline=NEWLINE if newline else "",
    )
