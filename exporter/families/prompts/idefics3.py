"""Prompts of Idefics3 and SmolVLM: tiles, chat template and image tokens, with one model's files.

The expansion is that of transformers' Idefics3Processor and SmolVLMProcessor: each image becomes
``<fake_token_around_image><row_r_col_c>`` and its image tokens per tile, a newline per row, and the
whole image behind ``<global-img>``. The text is tokenized as a whole, so the markers may be plain
text, as they are in SmolVLM-2.2B's tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import DecoderSpec, PromptInputs, TowerSpec
from exporter.families.images.tiling import TilingSettings, read_settings, split_image
from exporter.families.prompts.text import TextSide, read_text_side, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import read_image_settings, read_optional

IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
END = "<end_of_utterance>"
MARKERS = re.compile(r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>")


def image_text(rows: int, cols: int, tokens: int) -> str:
    """What stands for one image of `rows` x `cols` tiles (0 x 0: unsplit), `tokens` rows a tile."""
    whole = f"{FAKE}{GLOBAL}{IMAGE * tokens}{FAKE}"
    if rows == 0 and cols == 0:
        return whole
    lines = (
        "".join(f"{FAKE}<row_{r}_col_{c}>{IMAGE * tokens}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    return "".join(lines) + "\n" + whole


class Idefics3Preparer:
    """`families.base.Preparer` for one model folder."""

    def __init__(
        self, text: TextSide, tiling: TilingSettings, tokens: int, image_token_id: int
    ) -> None:
        self.image_token_id = image_token_id
        self.generation = text.generation
        self._text, self._tiling, self._tokens = text, tiling, tokens

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Tiles of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds image markers, the template drops an image, or
        the tokens leave no room to answer.
        """
        typed = MARKERS.search(prompt)
        if typed:
            raise refuse_typed(typed.group())
        tiles = [split_image(image, self._tiling) for image in images]
        first, *parts = split_at_images(self._text.render(len(images), prompt), IMAGE, len(images))
        written = [image_text(t.rows, t.cols, self._tokens) for t in tiles]
        text = first + "".join(w + p for w, p in zip(written, parts, strict=True))
        ids = np.array(self._text.encode(text), np.int64)
        # One tile a run: batches of 2 and 4 were not faster at SmolVLM-256M's size and need more memory.
        runs = tuple({"pixel_values": p[None, None]} for t in tiles for p in t.pixel_values)
        self._text.check(ids, self.image_token_id, len(runs) * self._tokens, IMAGE)
        return PromptInputs(ids, runs)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self._text.decode(tokens)


def read_preparer(
    folder: Path, config: Mapping[str, Any], decoder: DecoderSpec, tower: TowerSpec
) -> Idefics3Preparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    text = read_text_side(folder, config, decoder, (END,))
    tiling = read_settings(*read_image_settings(folder))
    if tiling.tile != tower.image_size:
        raise InputRefused(
            f"{folder}: tiles of {tiling.tile} pixels, config.json's tower takes {tower.image_size}"
        )
    declared = read_optional(folder / "processor_config.json").get("image_seq_len", tower.tokens)
    if declared != tower.tokens:
        raise InputRefused(
            f"{folder / 'processor_config.json'}: image_seq_len is {declared!r}, the sizes in config.json "
            f"give {tower.tokens}"
        )
    image_id = text.tokenizer.token_to_id(IMAGE)
    configured = config.get("image_token_id", image_id)
    if image_id is None or configured != image_id:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{IMAGE}' is token {image_id}, config.json says {configured}"
        )
    return Idefics3Preparer(text, tiling, tower.tokens, image_id)
