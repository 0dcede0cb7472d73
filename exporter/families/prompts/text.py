"""The text side of a prompt, the same in all families: one user message, tokens, and what they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.families.base import GenerationSettings
from exporter.families.prompts.chat import ChatTemplate
from exporter.families.prompts.textfiles import (
    read_template,
    read_tokenizer,
    special_tokens,
    stop_ids,
)
from exporter.families.specs.decoder import TextDecoder


@dataclass(frozen=True)
class TextSide:
    """Tokenizer and chat template of a model folder; `bos` is empty when there is none."""

    tokenizer: Tokenizer
    template: ChatTemplate
    bos: str
    vocabulary: int
    generation: GenerationSettings

    def render(self, images: int, prompt: str) -> str:
        """The chat template's text of one user message: `images`, then `prompt`."""
        content: list[dict[str, str]] = [{"type": "image"}] * images
        content = [*content, {"type": "text", "text": prompt}]
        return self.template.render(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text, with the tokenizer's own first and last ones."""
        # A template that writes the first token itself must not get it twice (as in transformers).
        twice = bool(self.bos) and text.startswith(self.bos)
        return list(self.tokenizer.encode(text, add_special_tokens=not twice).ids)

    def encode_further(self, text: str) -> list[int]:
        """Tokens of a later part of a text, without the tokenizer's own first and last ones."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        text: str = self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text.strip()

    def check(self, ids: NDArray[np.int64], image_token: int, rows: int, marker: str) -> None:
        """Raise `InputRefused` unless `ids` hold `rows` image tokens, are of the model's vocabulary
        and leave room to answer.
        """
        found = int((ids == image_token).sum())
        if found != rows:
            raise InputRefused(
                f"tokenizer.json made {found} image tokens of {rows}; expected '{marker}' to be one token"
            )
        if len(ids) >= self.generation.max_positions:
            raise InputRefused(
                f"image and prompt take {len(ids)} positions, the model has "
                f"{self.generation.max_positions}; shorten the prompt"
            )
        if len(ids) and int(ids.max()) >= self.vocabulary:
            raise InputRefused(
                f"tokenizer.json gives token {int(ids.max())}, config.json has a vocabulary of "
                f"{self.vocabulary}; they belong to different models"
            )


def split_at_images(text: str, marker: str, images: int) -> list[str]:
    """What stands before, between and behind the image markers of a rendered text.

    Raises `InputRefused` when the template wrote another number of them.
    """
    parts = text.split(marker)
    if len(parts) != images + 1:
        raise InputRefused(
            f"the chat template wrote {len(parts) - 1} image markers for {images} images; "
            "expected one each"
        )
    return parts


def refuse_typed(marker: str) -> InputRefused:
    """The error for a prompt that holds an image marker of its own."""
    return InputRefused(
        f"the prompt contains the image marker {marker}; remove it, images are placed before the text"
    )


def read_text_side(
    folder: Path, config: Mapping[str, Any], decoder: TextDecoder, also_stops: Sequence[str] = ()
) -> TextSide:
    """Read tokenizer, chat template and stop tokens of a model folder.

    `also_stops`: texts of tokens that end an answer although no file says so. Raises `InputRefused`.
    """
    tokenizer = read_tokenizer(folder)
    special = special_tokens(folder)
    template = ChatTemplate(*read_template(folder), special)
    stops = stop_ids(folder, config, tokenizer, also_stops)
    generation = GenerationSettings(stops, decoder.max_positions)
    return TextSide(
        tokenizer, template, special.get("bos_token", ""), decoder.vocab_size, generation
    )
