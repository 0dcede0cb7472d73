"""Prompts of LLaVA-1.5, LLaVA-NeXT and LLaVA-Med: images, chat template and image tokens.

Where the tokenizer has ``<image>`` as a token, the expansion is that of transformers' LlavaProcessor
and LlavaNextProcessor: as many of them as the image has feature rows, in one tokenized text. Where it
has none, as the original LLaVA code has it (``tokenizer_image_token``), the text between the images
is tokenized piece by piece, and config.json names the token that stands for a feature row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec, Feed, PromptInputs
from exporter.families.config import image_token
from exporter.families.images.anyres import (
    AnyresSettings,
    config_grid,
    feature_index,
    read_anyres_settings,
    split_anyres,
)
from exporter.families.images.clip import ClipImageSettings, clip_pixels, read_clip_settings
from exporter.families.prompts.text import TextSide, read_text_side, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import read_image_settings, read_optional
from exporter.families.specs.llava_vision import LlavaVision

IMAGE = "<image>"
# LlavaConfig's and LlavaNextConfig's default.
IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class ImagePart:
    """The runs' feed for one image, its feature rows, and its (height, width) in pixels."""

    feed: Feed
    rows: int
    size: tuple[int, int]


class LlavaPreparer:
    """`families.base.Preparer` for one model folder; `image_token_id` stands for a feature row."""

    def __init__(
        self,
        text: TextSide,
        images: ClipImageSettings | AnyresSettings,
        vision: LlavaVision,
        image_token_id: int,
        *,
        has_marker: bool,
    ) -> None:
        self.image_token_id = image_token_id
        self.generation = text.generation
        self._text, self._images, self._vision = text, images, vision
        self._has_marker = has_marker

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Pixels of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds an image marker, the template drops an image, or
        the tokens leave no room to answer.
        """
        if IMAGE in prompt:
            raise refuse_typed(IMAGE)
        found = [self._image(image) for image in images]
        parts = split_at_images(self._text.render(len(images), prompt), IMAGE, len(images))
        ids = np.array(self._tokens(parts, [f.rows for f in found]), np.int64)
        self._text.check(ids, self.image_token_id, sum(f.rows for f in found), IMAGE)
        return PromptInputs(ids, tuple(f.feed for f in found), sizes=tuple(f.size for f in found))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self._text.decode(tokens)

    def _image(self, image: Image) -> ImagePart:
        size = (image.height, image.width)
        settings, tower = self._images, self._vision.tower
        if isinstance(settings, ClipImageSettings):
            pixels = clip_pixels(image, settings)[None]
            return ImagePart({"pixel_values": pixels[None]}, self._vision.tokens, size)
        pixels = split_anyres(image, settings)
        _, index = feature_index(size, settings.grid, settings.tile, tower.patches)
        feed: Feed = {"pixel_values": pixels[None], "feature_index": index}
        return ImagePart(feed, len(index), size)

    def _tokens(self, parts: Sequence[str], rows: Sequence[int]) -> list[int]:
        first, *later = parts
        pairs = list(zip(rows, later, strict=True))
        if self._has_marker:
            return self._text.encode(first + "".join(IMAGE * n + part for n, part in pairs))
        ids = self._text.encode(first)
        for count, part in pairs:
            ids += [self.image_token_id] * count + self._text.encode_further(part)
        return ids


def read_llava_preparer(
    folder: Path, config: Mapping[str, Any], decoder: DecoderSpec, vision: LlavaVision
) -> LlavaPreparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    text = read_text_side(folder, config, decoder)
    images = _image_settings(folder, config, vision)
    _check_processor(folder, vision)
    marker = text.tokenizer.token_to_id(IMAGE)
    configured = image_token(config)
    configured = IMAGE_TOKEN if configured is None else configured
    if marker not in (None, configured) or not 0 <= configured < decoder.vocab_size:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{IMAGE}' is token {marker}, config.json says {configured} in "
            f"a vocabulary of {decoder.vocab_size}; they belong to different models"
        )
    return LlavaPreparer(text, images, vision, configured, has_marker=marker is not None)


def _image_settings(
    folder: Path, config: Mapping[str, Any], vision: LlavaVision
) -> ClipImageSettings | AnyresSettings:
    raw, where = read_image_settings(folder)
    side = vision.tower.image_size
    if not vision.newline:
        clip = read_clip_settings(raw, where)
        if clip.output() != (side, side):
            raise InputRefused(
                f"{where}: images become {clip.output() or 'of any size'}, config.json's tower takes "
                f"{side} x {side} pixels"
            )
        return clip
    anyres, grid = read_anyres_settings(raw, where), config_grid(config, side)
    if anyres.tile != side or anyres.grid != grid:
        raise InputRefused(
            f"{where}: tiles of {anyres.tile} pixels in {list(anyres.grid)}, config.json has {side} in "
            f"{list(grid)}"
        )
    return anyres


def _check_processor(folder: Path, vision: LlavaVision) -> None:
    """The processor's own count of rows per tile, where a folder declares it."""
    path = folder / "processor_config.json"
    processor = read_optional(path)
    expected = {
        "patch_size": vision.tower.patch_size,
        "vision_feature_select_strategy": "full" if vision.class_token else "default",
    }
    for key, value in expected.items():
        if processor.get(key) not in (None, value):
            raise InputRefused(
                f"{path}: {key} is {processor[key]!r}, the sizes in config.json give {value!r}"
            )
