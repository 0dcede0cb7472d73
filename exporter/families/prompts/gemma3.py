"""Prompts of Gemma 3: images, chat template and image tokens, with one model's files.

The expansion is that of transformers' Gemma3Processor: the template's ``<start_of_image>`` becomes two
newlines, itself, a soft token per feature row, ``<end_of_image>`` and two newlines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import PromptInputs
from exporter.families.config import count, image_token
from exporter.families.images.clip import ClipImageSettings, clip_pixels
from exporter.families.images.gemma3 import read_gemma3_settings
from exporter.families.prompts.text import TextSide, read_text_side, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import read_image_settings, read_optional
from exporter.families.specs.gemma3 import Gemma3Decoder, PooledSiglip, seen_positions

# Of Gemma3Config.
BEGIN_TOKEN, END_TOKEN, IMAGE_TOKEN = 255_999, 256_000, 262_144
TURN = "<end_of_turn>"


@dataclass(frozen=True)
class ImageMarkers:
    """Texts of the tokens around an image, of the one for a feature row, and that one's id."""

    begin: str
    end: str
    soft: str
    soft_id: int

    def written(self, rows: int) -> str:
        """What stands for an image of `rows` feature rows."""
        return f"\n\n{self.begin}{self.soft * rows}{self.end}\n\n"


class Gemma3Preparer:
    """`families.base.Preparer` for one model folder; `image_token_id` stands for a feature row."""

    def __init__(
        self, text: TextSide, images: ClipImageSettings, rows: int, markers: ImageMarkers
    ) -> None:
        self.image_token_id = markers.soft_id
        self.generation = text.generation
        self._text, self._images, self._rows, self._markers = text, images, rows, markers

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Pixels of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds an image marker, the template drops an image, or
        the tokens leave no room to answer.
        """
        markers, count = self._markers, len(images)
        for typed in (markers.begin, markers.end, markers.soft):
            if typed in prompt:
                raise refuse_typed(typed)
        parts = split_at_images(self._text.render(count, prompt), markers.begin, count)
        ids = np.array(self._text.encode(markers.written(self._rows).join(parts)), np.int64)
        self._text.check(ids, markers.soft_id, count * self._rows, markers.soft)
        pixels = [clip_pixels(image, self._images)[None, None] for image in images]
        feeds = tuple({"pixel_values": p} for p in pixels)
        return PromptInputs(ids, feeds, positions=seen_positions(ids == markers.soft_id))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self._text.decode(tokens)


def read_gemma3_preparer(
    folder: Path, config: Mapping[str, Any], decoder: Gemma3Decoder, vision: PooledSiglip
) -> Gemma3Preparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    text = read_text_side(folder, config, decoder, (TURN,))
    raw, where = read_image_settings(folder)
    images, side = read_gemma3_settings(raw, where), vision.image_size
    if images.output() != (side, side):
        raise InputRefused(
            f"{where}: images become {images.output() or 'of any size'}, config.json's tower takes "
            f"{side} x {side} pixels"
        )
    path = folder / "processor_config.json"
    declared = read_optional(path).get("image_seq_length", vision.tokens)
    if declared != vision.tokens:
        raise InputRefused(
            f"{path}: image_seq_length is {declared!r}, config.json has mm_tokens_per_image "
            f"{vision.tokens}"
        )
    return Gemma3Preparer(text, images, vision.tokens, _markers(folder, config, text, decoder))


def _markers(
    folder: Path, config: Mapping[str, Any], text: TextSide, decoder: Gemma3Decoder
) -> ImageMarkers:
    """The tokens that config.json names, as tokenizer.json writes them."""
    configured = image_token(config)
    soft = IMAGE_TOKEN if configured is None else configured
    begin = count(config, "boi_token_index", BEGIN_TOKEN, "config")
    end = count(config, "eoi_token_index", END_TOKEN, "config")
    texts = [text.tokenizer.id_to_token(token) for token in (begin, end, soft)]
    known = [text for text in texts if text is not None]
    if len(known) != len(texts) or max(begin, end, soft) >= decoder.vocab_size:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: config.json's image tokens {begin}, {end} and {soft} are "
            f"{texts} in a vocabulary of {decoder.vocab_size}; they belong to different models"
        )
    return ImageMarkers(known[0], known[1], known[2], soft)
