"""Prompts of Qwen2-VL and Qwen2.5-VL: chat template, image tokens and three-axis positions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec, GenerationSettings, PromptInputs
from exporter.families.config import image_token
from exporter.families.images.qwen import QwenImageSettings, image_patches, read_settings
from exporter.families.prompts.text import TextSide, read_text_side, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import read_image_settings
from exporter.families.specs.qwen_vision import QwenVisionSpec, vision_feed

IMAGE = "<|image_pad|>"
END = "<|im_end|>"
MARKERS = re.compile(r"<\|(?:image_pad|video_pad|vision_start|vision_end|vision_pad)\|>")
AXES = 3


def positions(is_image: NDArray[np.bool_], grids: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Positions int64 ``[3, length]`` (time, row, column) of a prompt (M-RoPE, arXiv 2409.12191).

    `grids`: rows and columns of feature rows per image, in order. Text advances all axes by one; an
    image stands at one time, its rows and columns counted from there, and what follows goes on
    behind the larger of both. Raises ValueError when `is_image` has another number of places.
    """
    if int(is_image.sum()) != sum(h * w for h, w in grids):
        raise ValueError(f"{int(is_image.sum())} image tokens for images of {list(grids)}")
    parts: list[NDArray[np.int64]] = []
    place, start, images = 0, 0, iter(grids)
    while place < len(is_image):
        if is_image[place]:
            height, width = next(images)
            parts.append(start + np.indices((1, height, width)).reshape(AXES, -1))
            place += height * width
            start += max(height, width)
            continue
        behind = np.flatnonzero(is_image[place:])
        length = int(behind[0]) if len(behind) else len(is_image) - place
        parts.append(np.broadcast_to(start + np.arange(length), (AXES, length)))
        place += length
        start += length
    return np.concatenate([np.zeros((AXES, 0), np.int64), *parts], axis=1).astype(np.int64)


@dataclass(frozen=True)
class QwenPreparer:
    """`families.base.Preparer` for one model folder."""

    image_token_id: int
    text: TextSide
    settings: QwenImageSettings
    vision: QwenVisionSpec

    @property
    def generation(self) -> GenerationSettings:
        """When an answer ends."""
        return self.text.generation

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Patches of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds image markers, the template drops an image, or
        the tokens leave no room to answer.
        """
        typed = MARKERS.search(prompt)
        if typed:
            raise refuse_typed(typed.group())
        merge, feeds, grids = self.vision.merge, [], []
        for image in images:
            pixels, height, width = image_patches(image, self.settings, self.vision)
            feeds.append(vision_feed(self.vision, pixels, height, width))
            grids.append((height // merge, width // merge))
        rows = [height * width for height, width in grids]
        rendered = self.text.render(len(images), prompt)
        first, *parts = split_at_images(rendered, IMAGE, len(images))
        text = first + "".join(IMAGE * n + p for n, p in zip(rows, parts, strict=True))
        ids = np.array(self.text.encode(text), np.int64)
        self.text.check(ids, self.image_token_id, sum(rows), IMAGE)
        sizes = tuple((image.height, image.width) for image in images)
        return PromptInputs(
            ids, tuple(feeds), positions(ids == self.image_token_id, grids), sizes=sizes
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self.text.decode(tokens)


def read_preparer(
    folder: Path, config: Mapping[str, Any], decoder: DecoderSpec, vision: QwenVisionSpec
) -> QwenPreparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    text = read_text_side(folder, config, decoder, (END,))
    settings = read_settings(*read_image_settings(folder), vision)
    image_id, configured = text.tokenizer.token_to_id(IMAGE), image_token(config)
    if image_id is None or configured not in (None, image_id):
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{IMAGE}' is token {image_id}, config.json says {configured}"
        )
    return QwenPreparer(image_id, text, settings, vision)
