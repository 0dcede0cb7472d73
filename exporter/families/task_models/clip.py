"""CLIP (arXiv 2103.00020): images and texts in one space, for zero-shot classification and retrieval.

CheXzero has the same architecture and the original code's layout, which `families.layouts.openai_clip`
describes; merged it is a CLIP of transformers with image settings of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.images.chest import (
    CHEST_IMAGES,
    CHEST_PROCESSOR,
    chest_pixels,
    read_chest_settings,
)
from exporter.families.images.clip import clip_pixels, read_clip_settings
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.openai_clip import (
    CHEXZERO,
    CUTS,
    NAMES,
    TURNED,
    openai_clip_config,
    openai_clip_sizes,
)
from exporter.families.layouts.published import PublishedLayout, modern
from exporter.families.prompts.clip import ClipTokens, read_clip_tokens
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.text import clip
from exporter.families.specs.clip import clip_image, clip_text
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPES = ("clip", "chexzero")
TASK: Task = "zero-shot"
TORCH_CLASSES = {"clip": "CLIPModel", "chexzero": "CLIPModel"}
PUBLISHED = {
    CHEXZERO: PublishedLayout(
        openai_clip_config,
        NameMap(NAMES),
        "take that of openai/clip-vit-base-patch32, which has the same tokens",
        {"preprocessor_config.json": CHEST_IMAGES},
        cuts=CUTS,
        turned=TURNED,
        sizes=openai_clip_sizes,
    )
}
EMBEDDING = "text_model.embeddings.token_embedding.weight"
LAYOUTS = (Layout(("clip",), (), EMBEDDING), Layout((CHEXZERO,), NAMES, EMBEDDING))
SHAPES = {"clip": clip, CHEXZERO: clip}
# What the config class puts where config.json has no key.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": 512,
    "text_config.hidden_size": 512,
    "text_config.intermediate_size": 2048,
    "text_config.num_hidden_layers": 12,
    "text_config.num_attention_heads": 8,
    "text_config.max_position_embeddings": 77,
    "text_config.vocab_size": 49408,
    "vision_config.hidden_size": 768,
    "vision_config.intermediate_size": 3072,
    "vision_config.num_hidden_layers": 12,
    "vision_config.num_attention_heads": 12,
    "vision_config.image_size": 224,
    "vision_config.patch_size": 32,
    "vision_config.layer_norm_eps": 1e-5,
}
# The paper's first prompt (section 3.1.4), and what CheXzero's notebook asks: the finding's name.
TEMPLATE, CHEST_TEMPLATE = "a photo of a {}.", "{}"
# Names of CLIP's image processor in all versions of transformers; the oldest settings name none.
PROCESSORS = (
    *(f"CLIPImageProcessor{kind}" for kind in ("", "Fast", "Pil")),
    "CLIPFeatureExtractor",
    None,
)

Pixels = Callable[[Image], NDArray[np.float32]]


class ClipPreparer:
    """`families.tasks.ZeroShotPreparer` for one model folder."""

    def __init__(self, pixels: Pixels, tokens: ClipTokens, template: str = TEMPLATE) -> None:
        """`pixels` gives float32 ``[3, side, side]`` of an image of any mode."""
        self.template = template
        self._pixels, self._tokens = pixels, tokens

    def images(self, images: Sequence[Image]) -> Feed:
        """pixel_values float32 ``[images, 3, side, side]``."""
        return {"pixel_values": np.stack([self._pixels(image) for image in images])}

    def texts(self, texts: Sequence[str]) -> Feed:
        """input_ids and attention_mask int64 ``[texts, length]``, padded to the longest; longer texts
        than the model has positions for are cut before their end token.
        """
        return self._tokens.encode(texts)


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = modern(config, PUBLISHED)
    image, text = clip_image(config), clip_text(config)
    return {VISION_GRAPH: image, TEXT_GRAPH: text}


def open_preparer(model_dir: Path) -> ClipPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = modern(read_config(model_dir / "config.json"), PUBLISHED)
    side = clip_image(config).tower.image_size
    tokens = read_clip_tokens(model_dir, clip_text(config))
    raw, where = read_image_settings(model_dir)
    if raw.get("image_processor_type") != CHEST_PROCESSOR:
        return ClipPreparer(read_pixels(model_dir, side), tokens)
    chest = read_chest_settings(raw, where)
    return ClipPreparer(lambda image: chest_pixels(image, chest, side), tokens, CHEST_TEMPLATE)


def read_pixels(folder: Path, side: int, processors: Collection[str | None] = PROCESSORS) -> Pixels:
    """What CLIP's image processor makes ``[3, side, side]`` of an image with, by a folder's settings.

    `processors`: names of the classes that prepare as CLIP's does. Raises `InputRefused` on settings of another class, or that give another size than the tower's
    `side`.
    """
    raw, where = read_image_settings(folder)
    kind = raw.get("image_processor_type", raw.get("feature_extractor_type"))
    if kind not in processors:
        named = ", ".join(name for name in processors if name)
        raise InputRefused(f"{where}: image settings of {kind!r}; expected one of {named}")
    settings = read_clip_settings(raw, where)
    if settings.output() != (side, side):
        raise InputRefused(
            f"{where}: images become {settings.output() or 'of any size'}, config.json's tower takes "
            f"{side} x {side} pixels"
        )
    return lambda image: clip_pixels(image, settings)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds, or text_embeds and logit_scale, of a CLIPModel."""
    import torch

    arguments = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        return {"image_embeds": model.get_image_features(**arguments).pooler_output.numpy()}
    return {
        "text_embeds": model.get_text_features(**arguments).pooler_output.numpy(),
        "logit_scale": model.logit_scale.detach().exp().numpy(),
    }
