"""SigLIP (arXiv 2303.15343), of which MedSigLIP is one: images and texts in one space, each pair scored
by itself.

The score of a pair is a probability of its own, sigmoid(scale x cosine + bias), where CLIP's is a share
among the labels asked for. SigLIP 2's checkpoints of a fixed resolution have the same class and
model_type, but Gemma's tokenizer, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.images.clip import clip_pixels
from exporter.families.images.vit import read_vit_settings
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.siglip import SiglipTokens, read_siglip_tokens
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.siglip import siglip
from exporter.families.specs.siglip import (
    BLOCK_SIZES,
    IMAGE_SIZE,
    NORM_EPS,
    PATCH_SIZE,
    TEXT_LENGTH,
    VOCABULARY,
    siglip_image,
    siglip_text,
)
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPE = "siglip"
MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: "SiglipModel"}
# Names and config are transformers'; the published folders may hold spiece.model alone.
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        dict,
        NameMap(()),
        "spiece.model is not read: take that of google/siglip-base-patch16-224, which has the same tokens",
    )
}
LAYOUTS = (Layout(MODEL_TYPES, (), "text_model.embeddings.token_embedding.weight"),)
SHAPES = {MODEL_TYPE: siglip}
CONFIG_DEFAULTS: Mapping[str, Value] = {
    **{f"{part}_config.{key}": v for part in ("text", "vision") for key, v in BLOCK_SIZES.items()},
    "text_config.vocab_size": VOCABULARY,
    "text_config.max_position_embeddings": TEXT_LENGTH,
    "text_config.layer_norm_eps": NORM_EPS,
    "vision_config.image_size": IMAGE_SIZE,
    "vision_config.patch_size": PATCH_SIZE,
    "vision_config.layer_norm_eps": NORM_EPS,
}
# What MedSigLIP's authors put around a label (their notebook: "a photo of an arm with no rash").
TEMPLATE = "a photo of {}"
PROCESSORS = (*(f"SiglipImageProcessor{kind}" for kind in ("", "Fast", "Pil")), None)
BICUBIC = 3

Pixels = Callable[[Image], NDArray[np.float32]]


@dataclass(frozen=True)
class SiglipPreparer:
    """`families.tasks.ZeroShotPreparer`: `pixels` gives ``[3, side, side]`` of an image of any mode."""

    pixels: Pixels
    tokens: SiglipTokens
    template: str = TEMPLATE

    def images(self, images: Sequence[Image]) -> Feed:
        """pixel_values float32 ``[images, 3, side, side]``."""
        return {"pixel_values": np.stack([self.pixels(image) for image in images])}

    def texts(self, texts: Sequence[str]) -> Feed:
        """input_ids int64 ``[texts, length]``, all of the model's length; longer texts are cut before
        their end token. Raises `InputRefused` for no text.
        """
        return self.tokens.encode(texts)


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: siglip_image(config), TEXT_GRAPH: siglip_text(config)}


def open_preparer(model_dir: Path) -> SiglipPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = read_config(model_dir / "config.json")
    pixels = read_pixels(model_dir, siglip_image(config).tower.image_size)
    return SiglipPreparer(pixels, read_siglip_tokens(model_dir, siglip_text(config)))


def read_pixels(folder: Path, side: int) -> Pixels:
    """What SigLIP's image processor makes ``[3, side, side]`` of an image with, by a folder's settings.

    The image is resized without keeping its shape. Raises `InputRefused` on settings of another class,
    or that give another size than the tower's `side`.
    """
    raw, where = read_image_settings(folder)
    if raw.get("image_processor_type") not in PROCESSORS:
        raise InputRefused(
            f"{where}: image settings of {raw['image_processor_type']!r}; expected SiglipImageProcessor's"
        )
    if isinstance(raw.get("size"), int):
        raise InputRefused(
            f"{where}: size is {raw['size']}, the shortest edge; expected height and width"
        )
    settings = read_vit_settings({"resample": BICUBIC, **raw}, where)
    if settings.output() != (side, side):
        raise InputRefused(
            f"{where}: images become {settings.output() or 'of any size'}, config.json's tower takes "
            f"{side} x {side} pixels"
        )
    return lambda image: clip_pixels(image, settings)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds, or text_embeds, logit_scale and logit_bias, of a SiglipModel."""
    import torch

    arguments = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        return {"image_embeds": model.get_image_features(**arguments).pooler_output.numpy()}
    return {
        "text_embeds": model.get_text_features(**arguments).pooler_output.numpy(),
        "logit_scale": model.logit_scale.detach().exp()[0].numpy(),
        "logit_bias": model.logit_bias.detach()[0].numpy(),
    }
