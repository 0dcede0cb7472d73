"""MedFILIP (arXiv 2501.10775): ResNet-50 and CLIP's text transformer in one space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporter.catalog.schema import Value
from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_config
from exporter.families.base import Feed
from exporter.families.layouts.medfilip import (
    CLASS,
    MODEL_TYPE,
    RESNET,
    SIDE,
    SIZE,
    medfilip_config,
)
from exporter.families.layouts.names import Layout, NameMap
from exporter.families.layouts.published import PublishedLayout
from exporter.families.prompts.clip import ClipTokens, read_clip_tokens
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.shapes.resnet import medfilip
from exporter.families.specs.clip import TEXT_SIZES, ClipText, clip_text
from exporter.families.specs.resnet import RESNET_50, ResNetImage, resnet_image
from exporter.families.tasks import TEXT_GRAPH, VISION_GRAPH, GraphSpec, Outputs, Task

MODEL_TYPES = (MODEL_TYPE,)
TASK: Task = "zero-shot"
TORCH_CLASSES = {MODEL_TYPE: f"exporter.families.reference.medfilip:{CLASS}"}
# Names are its own code's; its image settings are those of its user's training set.
PUBLISHED = {
    MODEL_TYPE: PublishedLayout(
        medfilip_config, NameMap(()), "take that of openai/clip-vit-base-patch32"
    )
}
LAYOUTS = (Layout(MODEL_TYPES, (), embedding="text_model.embeddings.token_embedding.weight"),)
SHAPES = {MODEL_TYPE: medfilip}
# The published code's: torchvision's resnet50 and CLIPTextConfig's sizes.
CONFIG_DEFAULTS: Mapping[str, Value] = {
    "projection_dim": SIZE,
    "vision_config.model_type": RESNET,
    "vision_config.image_size": SIDE,
    "vision_config.embedding_size": 64,
    "vision_config.depths": RESNET_50,
    **{f"text_config.{key}": value for key, value in TEXT_SIZES.items()},
}
# Its texts are descriptions of a disease, with nothing around them.
TEMPLATE = "{}"
PREFIX = "image_model."
PROCESSOR = "MedFILIPImageProcessor"


@dataclass(frozen=True)
class MedfilipPreparer:
    """`families.tasks.ZeroShotPreparer`; `mean` and `std` are of gray values between 0 and 1."""

    side: int
    mean: float
    std: float
    tokenizer: ClipTokens
    template: str = TEMPLATE

    def images(self, images: Sequence[Image.Image]) -> Feed:
        """pixel_values float32 ``[images, 3, side, side]``: gray, stretched to a square, normalised."""
        return {"pixel_values": np.stack([self._pixels(image) for image in images])}

    def texts(self, texts: Sequence[str]) -> Feed:
        """input_ids and attention_mask int64 ``[texts, length]``, padded to the longest; longer texts
        than the model has positions for are cut before their end token. Raises `InputRefused` for no
        text.
        """
        return self.tokenizer.encode(texts)

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        gray = image if image.mode == "L" else image.convert("L")
        levels = np.asarray(gray, np.float32) / np.float32(255)
        # Pillow keeps float values float, and smooths as torch's antialias does.
        small = Image.fromarray(levels).resize((self.side, self.side), Image.Resampling.BILINEAR)
        normal = (np.asarray(small) - np.float32(self.mean)) / np.float32(self.std)
        return np.repeat(normal[None], 3, axis=0)


def image_spec(config: Mapping[str, Any]) -> ResNetImage:
    """The image half of a parsed config.json. Raises `InputRefused` on a bad one."""
    config = medfilip_config(config)
    size = config["projection_dim"]
    vision = config["vision_config"]
    return resnet_image(vision, PREFIX, output_size=size, bias=True, image_size=SIDE)


def text_spec(config: Mapping[str, Any]) -> ClipText:
    """The text half of a parsed config.json. Raises `InputRefused` on a bad one."""
    return clip_text(medfilip_config(config))


def graphs(config: Mapping[str, Any]) -> Mapping[str, GraphSpec]:
    """Image and text encoder of a parsed config.json. Raises `InputRefused` on a bad one."""
    return {VISION_GRAPH: image_spec(config), TEXT_GRAPH: text_spec(config)}


def open_preparer(model_dir: Path) -> MedfilipPreparer:
    """Tokenizer and image settings of a model folder. Raises `InputRefused`."""
    config = medfilip_config(read_config(model_dir / "config.json"))
    raw, where = read_image_settings(model_dir)
    try:
        if raw.get("image_processor_type", PROCESSOR) != PROCESSOR:
            raise ValueError(f"image_processor_type is {raw['image_processor_type']!r}")
        mean, std = float(raw["image_mean"]), float(raw["image_std"])
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise ValueError(f"image_mean is {mean}, image_std {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise InputRefused(
            f"{where}: bad image settings ({type(error).__name__}: {error}); expected image_mean and "
            "image_std, numbers of the gray values between 0 and 1 that the model was trained on"
        ) from error
    tokens = read_clip_tokens(model_dir, text_spec(config))
    return MedfilipPreparer(image_spec(config).image_size, mean, std, tokens)


def torch_outputs(model: Any, graph: str, feed: Feed) -> Outputs:
    """image_embeds, or text_embeds and logit_scale, of the family's own class."""
    import torch

    arguments = {name: torch.from_numpy(array) for name, array in feed.items()}
    if graph == VISION_GRAPH:
        return {"image_embeds": model.image_model(arguments["pixel_values"]).numpy()}
    return {
        "text_embeds": model.encode_text(**arguments).numpy(),
        "logit_scale": model.logit_scale.detach().exp().numpy(),
    }
