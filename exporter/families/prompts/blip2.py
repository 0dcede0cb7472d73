"""Prompts of BLIP-2 and of models made of its parts: images, text, and a token for each feature row.

Without a chat template the text is that of transformers' Blip2Processor: the image tokens stand even
before the tokenizer's first token. Where the tokenizer has no ``<image>`` (XrayGPT: the original code
puts embeddings between two pieces of text), the pieces are tokenized one by one, and config.json
names the token that stands for a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import GenerationSettings, PromptInputs
from exporter.families.config import image_token
from exporter.families.images.clip import ClipImageSettings, clip_pixels, read_clip_settings
from exporter.families.prompts.chat import ChatTemplate
from exporter.families.prompts.text import TextSide, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import (
    find_template,
    read_image_settings,
    read_tokenizer,
    special_tokens,
    stop_ids,
)
from exporter.families.specs.blip2_vision import Blip2Vision
from exporter.families.specs.decoder import TextDecoder

IMAGE = "<image>"
# BlipImageProcessor's default.
SIDE = 384
# What Blip2Processor makes of images and a text.
PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


class Blip2Preparer:
    """`families.base.Preparer` for one model folder; an image has `tokens` feature rows."""

    def __init__(
        self, text: TextSide, images: ClipImageSettings, tokens: int, image_token_id: int
    ) -> None:
        self.image_token_id = image_token_id
        self.generation = text.generation
        self._text, self._images, self._rows = text, images, tokens

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Pixels of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds an image marker, the template drops an image, or
        the tokens leave no room to answer.
        """
        if IMAGE in prompt:
            raise refuse_typed(IMAGE)
        parts = split_at_images(self._text.render(len(images), prompt), IMAGE, len(images))
        ids = np.array(self._tokens(parts), np.int64)
        self._text.check(ids, self.image_token_id, len(images) * self._rows, IMAGE)
        feeds = [{"pixel_values": clip_pixels(i, self._images)[None, None]} for i in images]
        sizes = tuple((image.height, image.width) for image in images)
        return PromptInputs(ids, tuple(feeds), sizes=sizes)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self._text.decode(tokens)

    def _tokens(self, parts: Sequence[str]) -> list[int]:
        """Tokens of the text `parts`, with an image's rows between one and the next."""
        # The first text, if only an empty one, brings the tokenizer's first token; images before it
        # stay before that.
        begin = next((i for i, part in enumerate(parts) if part), len(parts) - 1)
        ids: list[int] = []
        for place, part in enumerate(parts):
            ids += [self.image_token_id] * self._rows if place else []
            if place >= begin:
                ids += (
                    self._text.encode(part) if place == begin else self._text.encode_further(part)
                )
        return ids


def read_blip2_preparer(
    folder: Path, config: Mapping[str, Any], decoder: TextDecoder, vision: Blip2Vision
) -> Blip2Preparer:
    """Read tokenizer, chat template where there is one, image and generation settings of a folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    text = _text_side(folder, config, decoder)
    images = read_blip_settings(*read_image_settings(folder))
    side = vision.tower.image_size
    if images.output() != (side, side):
        raise InputRefused(
            f"{folder}: the image settings make {images.output() or 'images of any size'}, config.json's "
            f"tower takes {side} x {side} pixels"
        )
    marker, configured = text.tokenizer.token_to_id(IMAGE), image_token(config)
    if configured is None or marker not in (None, configured):
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{IMAGE}' is token {marker}, config.json's image_token_index is "
            f"{configured}; expected the same, take tokenizer and config of one revision from 2024-11 on"
        )
    if not 0 <= configured < decoder.vocab_size:
        raise InputRefused(
            f"config.json: image_token_index is {configured}; expected a token of the vocabulary of "
            f"{decoder.vocab_size}"
        )
    return Blip2Preparer(text, images, vision.tokens, configured)


def read_blip_settings(raw: Mapping[str, Any], where: str) -> ClipImageSettings:
    """Settings from a parsed preprocessor_config.json; absent keys take BlipImageProcessor's defaults.

    Raises `InputRefused` naming `where` on wrong types or sizes, and for a crop, which it has not.
    """
    if raw.get("do_center_crop"):
        raise InputRefused(f"{where}: do_center_crop is true; expected none of a BLIP processor")
    size = SIDE if raw.get("size") is None else raw["size"]
    square = {"height": size, "width": size} if type(size) is int else size
    return read_clip_settings({**raw, "size": square, "do_center_crop": False}, where)


def _text_side(folder: Path, config: Mapping[str, Any], decoder: TextDecoder) -> TextSide:
    tokenizer, special = read_tokenizer(folder), special_tokens(folder)
    template = ChatTemplate(*(find_template(folder) or (PLAIN, "Blip2Processor")), special)
    also = config.get("stop_tokens") or []
    if not isinstance(also, list) or not all(isinstance(text, str) for text in also):
        raise InputRefused(f"config.json: stop_tokens is {also!r}; expected texts of tokens")
    stops = stop_ids(folder, config, tokenizer, also)
    generation = GenerationSettings(stops, decoder.max_positions)
    bos = special.get("bos_token", "")
    return TextSide(tokenizer, template, bos, decoder.vocab_size, generation)
