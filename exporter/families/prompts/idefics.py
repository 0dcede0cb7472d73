"""Prompts of IDEFICS: images, turns of User and Assistant, and which image each token sees.

The text is that of transformers' IdeficsProcessor: an image stands in it as one ``<image>`` between
two ``<fake_token_around_image>``, of which neighbouring images share one. A token sees the last image
before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from exporter.core.errors import InputRefused
from exporter.families.base import PromptInputs
from exporter.families.images.clip import ClipImageSettings, clip_pixels, read_clip_settings
from exporter.families.prompts.text import TextSide, read_text_side, refuse_typed, split_at_images
from exporter.families.prompts.textfiles import read_image_settings, special_tokens
from exporter.families.specs.idefics import GatedLlama

IMAGE, FAKE, END = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
IMAGE_SIZE = 224
# IdeficsProcessor is given the turns' texts; its repositories have no chat template.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ message['role'].capitalize() + ':' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'text' %}"
    "{% if loop.first %}{{ ' ' }}{% endif %}{{ part['text'].strip(' ') }}"
    "{% endif %}{% endfor %}{{ '<end_of_utterance>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nAssistant:' }}{% endif %}"
)


def image_mask(
    ids: Sequence[int] | NDArray[np.int64], image: int, images: int, end: int | None
) -> NDArray[np.int64]:
    """int64 ``[length, images]``: 1 for the last image token up to each place.

    Nothing is seen before the first image, nor behind the token `end` until another image comes.
    """
    mask = np.zeros((len(ids), images), np.int64)
    last, ended = -1, False
    for place, token in enumerate(ids):
        if token == image:
            last, ended = last + 1, False
        if last >= 0 and not ended:
            mask[place, last] = 1
        ended = ended or token == end
    return mask


class IdeficsPreparer:
    """`families.base.Preparer` for one model folder; `image` and `end` are tokens."""

    def __init__(
        self, text: TextSide, images: ClipImageSettings, image: int, end: int | None
    ) -> None:
        self.generation = text.generation
        self._text, self._images, self._image, self._end = text, images, image, end
        # Only the instructed models have it; transformers' processor looks in the tokenizer too.
        self._ends_turns = text.tokenizer.token_to_id(END) is not None

    @property
    def image_token_id(self) -> None:
        """None: no row of features stands in the text; ``<image>`` is a token as any other."""
        return

    def prepare(self, images: Sequence[Image], prompt: str) -> PromptInputs:
        """Pixels of all `images` and the tokens of one user message with them before `prompt`.

        Raises `InputRefused` without an image, when the prompt holds an image marker, the template
        drops an image, or the tokens leave no room to answer.
        """
        if not images:
            raise InputRefused("no image in the prompt; this model needs at least one")
        for marker in (IMAGE, FAKE):
            if marker in prompt:
                raise refuse_typed(marker)
        rendered = self._text.render(len(images), prompt).replace(FAKE, "")
        if not self._ends_turns:
            rendered = rendered.replace(END, "")
        text = _surrounded(split_at_images(rendered, IMAGE, len(images)))
        ids = np.array(self._text.encode(text), np.int64)
        self._text.check(ids, self._image, len(images), IMAGE)
        pixels = np.stack([clip_pixels(image, self._images) for image in images])
        return PromptInputs(
            ids,
            ({"pixel_values": pixels[None]},),
            sizes=tuple((image.height, image.width) for image in images),
            image_mask=image_mask(ids, self._image, len(images), self._end),
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens, stripped."""
        return self._text.decode(tokens)


def read_idefics_preparer(
    folder: Path, config: Mapping[str, Any], decoder: GatedLlama, side: int
) -> IdeficsPreparer:
    """Read tokenizer, chat template, image and generation settings of a model folder.

    `side`: pixels of an image as the tower takes it. Raises `InputRefused` when a file is missing or
    they disagree with config.json.
    """
    text = read_text_side(folder, config, decoder, (END,))
    raw, where = read_image_settings(folder)
    size = raw.get("image_size") or raw.get("size") or IMAGE_SIZE
    square = {"height": size, "width": size} if type(size) is int else size
    images = read_clip_settings({**raw, "size": square, "do_center_crop": False}, where)
    if images.output() != (side, side):
        raise InputRefused(
            f"{where}: images become {images.output() or 'of any size'}, config.json's tower takes "
            f"{side} x {side} pixels"
        )
    image = text.tokenizer.token_to_id(IMAGE)
    if image is None or text.tokenizer.token_to_id(FAKE) is None:
        raise InputRefused(
            f"{folder / 'tokenizer.json'}: no token '{IMAGE}' or '{FAKE}'; expected both, is it the "
            "tokenizer of another model?"
        )
    end = text.tokenizer.token_to_id(special_tokens(folder).get("eos_token", ""))
    return IdeficsPreparer(text, images, image, end)


def _surrounded(parts: Sequence[str]) -> str:
    """The text with each image between two fake tokens; `parts` are split at the images."""
    text = parts[0]
    for place, part in enumerate(parts[1:]):
        shared = place > 0 and not parts[place]
        text += f"{'' if shared else FAKE}{IMAGE}{FAKE}{part}"
    return text
