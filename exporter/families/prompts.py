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
from exporter.families.chat import MAX_TEMPLATE, ChatTemplate
from exporter.families.tiling import TilingSettings, read_settings, split_image

IMAGE, FAKE, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
END = "<end_of_utterance>"
MARKERS = re.compile(r"<image>|<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


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
        side = self._tiling.tile
        pixels = [t.pixel_values for t in tiles] or [np.empty((0, 3, side, side), np.float32)]
        inputs = PromptInputs(ids, np.concatenate(pixels))
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
        expected = len(inputs.pixel_values) * self._tokens
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
    tokenizer = _tokenizer(folder)
    processor = _optional(folder / "processor_config.json")
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
    special = _special_tokens(folder)
    template = ChatTemplate(*_template(folder), special)
    generation = GenerationSettings(_stop_ids(folder, config, tokenizer), decoder.max_positions)
    bos = special.get("bos_token", "")
    return Idefics3Preparer(tokenizer, template, tiling, tower, decoder, generation, bos, image_id)


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    read_json(path)  # for its one-line errors and its size limit
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise InputRefused(f"{path}: not a tokenizer ({str(error)[:200]})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _template(folder: Path) -> tuple[str, str]:
    """Source and place of the chat template: the newest place first, as transformers looks."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        with plain.open("rb") as file:
            return file.read(5 * MAX_TEMPLATE).decode(errors="replace"), str(plain)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        source = _optional(folder / name).get("chat_template")
        if isinstance(source, str):
            return source, str(folder / name)
    raise InputRefused(
        f"{folder}: no chat template; expected chat_template.jinja, chat_template.json or one in "
        "tokenizer_config.json"
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    config = _optional(folder / "tokenizer_config.json")
    found = {key: config.get(key) for key in SPECIAL}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _stop_ids(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> frozenset[int]:
    path = folder / "generation_config.json"
    text = config.get("text_config") or {}
    declared = _optional(path).get(
        "eos_token_id", config.get("eos_token_id", text.get("eos_token_id"))
    )
    ids = declared if isinstance(declared, list) else [declared]
    stops = {i for i in [*ids, tokenizer.token_to_id(END)] if i is not None}
    if not stops or not all(type(i) is int for i in stops):
        raise InputRefused(f"{path}: eos_token_id is {declared!r}; expected a token id or a list")
    return frozenset(stops)
