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
from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.families.base import DecoderSpec, GenerationSettings, PromptInputs, TowerSpec
from exporter.families.chat import ChatTemplate
from exporter.families.textfiles import (
    read_optional,
    read_template,
    read_tokenizer,
    special_tokens,
    stop_ids,
)
from exporter.families.tiling import TilingSettings, read_settings, split_image

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
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tiling: TilingSettings,
        tower: TowerSpec,
        decoder: DecoderSpec,
        generation: GenerationSettings,
        bos: str,
        image_token_id: int,
    ) -> None:
        self.image_token_id = image_token_id
        self.generation = generation
        self._tokenizer, self._template, self._tiling = tokenizer, template, tiling
        self._tokens, self._vocabulary, self._bos = tower.tokens, decoder.vocab_size, bos

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Tiles of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` when the prompt holds image markers, the template drops an image, or
        the tokens leave no room to answer.
        """
        typed = MARKERS.search(prompt)
        if typed:
            raise InputRefused(
                f"the prompt contains the image marker {typed.group()}; remove it, images are placed "
                "before the text"
            )
        tiles = [split_image(image, self._tiling) for image in images]
        text = self._expand(
            self._render(len(images), prompt),
            [image_text(t.rows, t.cols, self._tokens) for t in tiles],
        )
        # A template that writes the first token itself must not get it twice (as in transformers).
        twice = bool(self._bos) and text.startswith(self._bos)
        encoding = self._tokenizer.encode(text, add_special_tokens=not twice)
        ids = np.array(encoding.ids, np.int64)
        # One tile a run: batches of 2 and 4 were not faster at SmolVLM-256M's size and need more memory.
        runs = tuple({"pixel_values": p[None, None]} for t in tiles for p in t.pixel_values)
        inputs = PromptInputs(ids, runs)
        self._check(inputs)
        return inputs

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        text: str = self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text.strip()

    def _render(self, images: int, prompt: str) -> str:
        content: list[dict[str, str]] = [{"type": "image"}] * images
        content = [*content, {"type": "text", "text": prompt}]
        return self._template.render(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def _expand(self, text: str, replacements: list[str]) -> str:
        parts = text.split(IMAGE)
        if len(parts) != len(replacements) + 1:
            raise InputRefused(
                f"the chat template wrote {len(parts) - 1} image markers for {len(replacements)} images; "
                "expected one each"
            )
        return parts[0] + "".join(r + p for r, p in zip(replacements, parts[1:], strict=True))

    def _check(self, inputs: PromptInputs) -> None:
        length, ids = len(inputs.input_ids), inputs.input_ids
        found = int((ids == self.image_token_id).sum())
        expected = len(inputs.vision) * self._tokens
        if found != expected:
            raise InputRefused(
                f"tokenizer.json made {found} image tokens of {expected}; expected '{IMAGE}' to be one token"
            )
        if length >= self.generation.max_positions:
            raise InputRefused(
                f"image and prompt take {length} positions, the model has {self.generation.max_positions}; "
                "shorten the prompt"
            )
        if length and int(ids.max()) >= self._vocabulary:
            raise InputRefused(
                f"tokenizer.json gives token {int(ids.max())}, config.json has a vocabulary of "
                f"{self._vocabulary}; they belong to different models"
            )


def read_preparer(
    folder: Path, config: Mapping[str, Any], decoder: DecoderSpec, tower: TowerSpec
) -> Idefics3Preparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    Raises `InputRefused` when a file is missing or they disagree with config.json.
    """
    tokenizer = read_tokenizer(folder)
    processor = read_optional(folder / "processor_config.json")
    nested = processor.get("image_processor")
    where = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    tiling = read_settings(nested or read_json(where), str(where))
    if tiling.tile != tower.image_size:
        raise InputRefused(
            f"{where}: tiles of {tiling.tile} pixels, config.json's tower takes {tower.image_size}"
        )
    declared = processor.get("image_seq_len", tower.tokens)
    if declared != tower.tokens:
        raise InputRefused(
            f"{folder / 'processor_config.json'}: image_seq_len is {declared!r}, the sizes in config.json "
            f"give {tower.tokens}"
        )
    image_id = tokenizer.token_to_id(IMAGE)
    configured = config.get("image_token_id", image_id)
    if image_id is None or configured != image_id:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{IMAGE}' is token {image_id}, config.json says {configured}"
        )
    special = special_tokens(folder)
    template = ChatTemplate(*read_template(folder), special)
    generation = GenerationSettings(
        stop_ids(folder, config, tokenizer, (END,)), decoder.max_positions
    )
    bos = special.get("bos_token", "")
    return Idefics3Preparer(tokenizer, template, tiling, tower, decoder, generation, bos, image_id)
