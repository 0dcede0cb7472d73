"""CRIS (arXiv 2111.15174): a mask for an image and an expression that refers to something on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.images.clip import ClipImageSettings, clip_feed
from exporter.families.images.vit import read_vit_settings
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.clip import ClipTokens, read_clip_tokens
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.cris import cris
from exporter.families.specs.clip import ClipText
from exporter.families.specs.cris import (
    CLASS,
    IMAGES,
    MODEL_TYPE,
    PUBLISHED_NAMES,
    CrisImage,
    CrisMask,
    CrisSizes,
    CrisText,
    cris_config,
    cris_sizes,
    level_shapes,
)
from exporter.families.tasks import (
    MASK_GRAPH,
    TEXT_GRAPH,
    VISION_GRAPH,
    GraphSpec,
    Outputs,
    Task,
)

MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "segmentation"
TORCH_CLASSES = {MODEL_TYPE: f"exporter.families.reference.cris:{CLASS}"}
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        cris_config,
        NameMap(PUBLISHED_NAMES),
        "take that of openai/clip-vit-base-patch32, which has the same tokens",
        {"preprocessor_config.json": IMAGES},
    )
}
LAYOUTS = (Layout(MODEL_TYPES, PUBLISHED_NAMES, embedding="backbone.token_embedding.weight"),)
SHAPES = {MODEL_TYPE: cris}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "input_size": 416,
    "clip_resolution": 224,
    "vision_width": 64,
    "vision_layers": (3, 4, 6, 3),
    "embed_dim": 1024,
    "text_width": 512,
    "text_layers": 12,
    "text_heads": 8,
    "vocab_size": 49408,
    "context_length": 77,
    "word_len": 17,
    "fpn_out": (256, 512, 1024),
    "num_layers": 3,
    "num_head": 8,
    "dim_ffn": 2048,
}
TEXT_OUTPUTS = ("text_embeds", "words", "word_mask")


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """See `families.tasks.TaskFamily`."""
    sizes = cris_sizes(config)
    return {
        VISION_GRAPH: CrisImage(sizes),
        TEXT_GRAPH: CrisText(sizes),
        MASK_GRAPH: CrisMask(sizes),
    }


@dataclass(frozen=True)
class CrisPreparer:
    """`families.tasks.SegmentationPreparer` for one model folder."""

    settings: ClipImageSettings
    tokens: ClipTokens
    length: int
    pad: int

    def images(self, images: Sequence[Image]) -> Feed:
        """``pixel_values`` float32 ``[images, 3, side, side]``: resized without keeping their shape."""
        return clip_feed(images, self.settings)

    def texts(self, texts: Sequence[str]) -> Feed:
        """``input_ids`` int64 ``[texts, word_len]``: padded, or cut before their end token."""
        found = self.tokens.encode(texts)
        ids = np.where(found["attention_mask"] == 1, found["input_ids"], self.pad)
        room = self.length - ids.shape[1]
        return {"input_ids": np.pad(ids, ((0, 0), (0, room)), constant_values=self.pad)}


def open_preparer(model_dir: Path) -> CrisPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    sizes = cris_sizes(read_config(model_dir / "config.json"))
    settings = read_vit_settings(*read_image_settings(model_dir))
    if settings.output() != (sizes.input_size, sizes.input_size):
        raise InputRefused(
            f"{model_dir / 'preprocessor_config.json'}: images become {settings.output()} pixels (height, "
            f"width), config.json's input_size is {sizes.input_size}"
        )
    tokens = read_clip_tokens(model_dir, _vocabulary(sizes))
    return CrisPreparer(settings, tokens, sizes.word_len, sizes.pad)


def _vocabulary(sizes: CrisSizes) -> ClipText:
    """What CLIP's tokenizer must fit: the highest id of a text is its end."""
    return ClipText(
        hidden_size=sizes.text_width,
        layers=sizes.text_layers,
        heads=sizes.text_heads,
        intermediate_size=4 * sizes.text_width,
        vocab_size=sizes.vocab_size,
        max_positions=sizes.word_len,
        norm_eps=1e-5,
        activation="quick_gelu",
        end=None,
        prefix="",
        projection="",
        output_size=sizes.embed_dim,
        logit_scale="",
    )


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """See `families.tasks.TaskFamily`, of the family's own class."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in feed.items()}
    names = tuple(level_shapes(cris_sizes(model.config.to_dict())))
    if graph == VISION_GRAPH:
        return {n: v.numpy() for n, v in zip(names, model.levels(**given), strict=True)}
    if graph == TEXT_GRAPH:
        return {n: v.numpy() for n, v in zip(TEXT_OUTPUTS, model.texts(**given), strict=True)}
    texts = [given[name] for name in TEXT_OUTPUTS]
    levels = tuple(given[name].expand(len(texts[0]), -1, -1, -1) for name in names)
    return {"logits": model.masks(levels, *texts).numpy()}
