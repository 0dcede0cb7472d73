"""Moondream's prompts: start token, the image's rows, and the question between lists of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.families.base import GenerationSettings, PromptInputs
from exporter.families.config import flag, image_token, section
from exporter.families.images.overlap_crops import vision_feed
from exporter.families.prompts.textfiles import read_tokenizer
from exporter.families.specs.moondream_vision import MoondreamVision
from exporter.families.specs.phi import PhiSpec

START = "<|endoftext|>"


@dataclass(frozen=True)
class MoondreamPreparer:
    """`families.base.Preparer` for one model folder.

    A prompt is `start`, a token for each row of the image, `before`, the question's own tokens and
    `after`: encoding them as one text would give other tokens (two line breaks are one).
    """

    image_token_id: int
    generation: GenerationSettings
    tokenizer: Tokenizer
    vision: MoondreamVision
    vocabulary: int
    start: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    space: bool

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Crops of the image and the tokens of a question about it.

        Raises `InputRefused` unless there is one image, and when the tokens leave no room to answer.
        """
        if len(images) != 1:
            raise InputRefused(f"{len(images)} images; Moondream takes one image in a prompt")
        question = f" {prompt}" if self.space else prompt
        encoded = self.tokenizer.encode(question, add_special_tokens=False).ids
        rows = [self.image_token_id] * self.vision.tokens
        ids = np.array([self.start, *rows, *self.before, *encoded, *self.after], np.int64)
        if (np.array(encoded, np.int64) >= self.image_token_id).any():
            raise InputRefused(
                f"tokenizer.json gives token {max(encoded)}, config.json has an image token "
                f"{self.image_token_id} behind the vocabulary; they belong to different models"
            )
        if len(ids) >= self.generation.max_positions:
            raise InputRefused(
                f"image and prompt take {len(ids)} positions, the model has "
                f"{self.generation.max_positions}; shorten the prompt"
            )
        return PromptInputs(
            ids, (vision_feed(images[0], self.vision.crops),), prefix_length=1 + len(rows)
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        text: str = self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text.strip()


def read_preparer(
    folder: Path, config: Mapping[str, Any], decoder: PhiSpec, vision: MoondreamVision
) -> MoondreamPreparer:
    """Read the tokenizer of a model folder and the prompt of its config.json (ours, see
    `moondream_published`). Raises `InputRefused` when they disagree.
    """
    tokenizer, prompt = read_tokenizer(folder), section(config, "prompt_config")
    start, stop = (_token(prompt, f"{key}_token_id", decoder) for key in ("bos", "eos"))
    found = tokenizer.token_to_id(START)
    if found != start:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: '{START}' is token {found}, config.json's start token is "
            f"{start}; is it the tokenizer of another revision?"
        )
    image = image_token(config)
    # The row of the embedding that stands for the image is overwritten, but must be nobody else's.
    if image is None or not tokenizer.get_vocab_size() <= image < decoder.vocab_size:
        raise InputRefused(
            f"{folder / 'config.json'}: image_token_id is {image}; expected one behind the tokenizer's "
            f"{tokenizer.get_vocab_size()} tokens and below the vocabulary's {decoder.vocab_size}"
        )
    return MoondreamPreparer(
        image_token_id=image,
        generation=GenerationSettings(frozenset({stop}), decoder.max_positions),
        tokenizer=tokenizer,
        vision=vision,
        vocabulary=decoder.vocab_size,
        start=start,
        before=_tokens(prompt, "query_prefix", decoder),
        after=_tokens(prompt, "query_suffix", decoder),
        space=flag(prompt, "space_before_question", False),
    )


def _token(prompt: Mapping[str, Any], key: str, decoder: PhiSpec) -> int:
    value = prompt.get(key)
    if type(value) is not int or not 0 <= value < decoder.vocab_size:
        raise InputRefused(
            f"config.json: prompt_config.{key} is {value!r}; expected a token below {decoder.vocab_size}"
        )
    return value


def _tokens(prompt: Mapping[str, Any], key: str, decoder: PhiSpec) -> tuple[int, ...]:
    values = prompt.get(key)
    good = isinstance(values, list) and all(
        type(v) is int and 0 <= v < decoder.vocab_size for v in values
    )
    if not good:
        raise InputRefused(
            f"config.json: prompt_config.{key} is {str(values)[:80]}; expected tokens below "
            f"{decoder.vocab_size}"
        )
    return tuple(values or ())
