"""Prompts of captioners that were trained without one: a start token, then what the caption begins with.

The image is no part of the text: the decoder sees it by cross-attention. A prompt is no instruction
to such a model but the beginning of its answer, as transformers' ``decoder_input_ids`` are.
"""

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
from exporter.families.images.clip import ClipImageSettings, clip_pixels
from exporter.families.prompts.textfiles import read_optional, read_tokenizer, stop_ids
from exporter.families.specs.decoder import TextDecoder


@dataclass(frozen=True)
class PrefixPreparer:
    """`families.base.Preparer` for one model folder. Its prompts are text that the caption goes on from."""

    tokenizer: Tokenizer
    images: ClipImageSettings
    start: int
    vocabulary: int
    generation: GenerationSettings

    @property
    def image_token_id(self) -> None:
        """None: the image does not stand in the text."""
        return

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """The pixels of one image, and the start token with the tokens of `prompt` behind it.

        Raises `InputRefused` for more or fewer images, and for a prompt that leaves no room.
        """
        if len(images) != 1:
            raise InputRefused(
                f"{len(images)} images in a prompt; this model captions one at a time, give one"
            )
        text = self.tokenizer.encode(prompt, add_special_tokens=False).ids if prompt else []
        ids = np.array([self.start, *text], np.int64)
        limit = self.generation.max_positions
        if len(ids) >= limit:
            raise InputRefused(
                f"the prompt takes {len(ids)} positions, the model has {limit}; shorten the prompt"
            )
        if int(ids.max()) >= self.vocabulary:
            raise InputRefused(
                f"tokenizer.json gives token {int(ids.max())}, config.json has a vocabulary of "
                f"{self.vocabulary}; they belong to different models"
            )
        image = images[0]
        pixels = clip_pixels(image, self.images)
        feed = {"pixel_values": pixels[None, None]}
        return PromptInputs(ids, (feed,), sizes=((image.height, image.width),))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        text: str = self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)
        return text.strip()


def read_prefix_preparer(
    folder: Path, config: Mapping[str, Any], decoder: TextDecoder, images: ClipImageSettings
) -> PrefixPreparer:
    """Read tokenizer and generation settings of a model folder. Raises `InputRefused`.

    `config` is the parsed config.json, the keys of its decoder part standing in for absent ones.
    """
    tokenizer = read_tokenizer(folder)
    stops = stop_ids(folder, config, tokenizer)
    declared = {**config, **read_optional(folder / "generation_config.json")}
    found = [declared.get(key) for key in ("decoder_start_token_id", "bos_token_id")]
    start = next((token for token in found if token is not None), None)
    if type(start) is not int or not 0 <= start < decoder.vocab_size:
        raise InputRefused(
            f"{folder / 'config.json'}: decoder_start_token_id is {start!r}; expected a token of the "
            f"vocabulary of {decoder.vocab_size}"
        )
    generation = GenerationSettings(stops, decoder.max_positions)
    return PrefixPreparer(tokenizer, images, start, decoder.vocab_size, generation)
