"""Texts of CLIP: tokenizer.json as transformers' CLIPTokenizer uses it, padded and cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.families.base import Feed
from exporter.families.prompts.textfiles import read_optional, read_tokenizer, special_tokens
from exporter.families.specs.clip import ClipText

# CLIPTokenizer's own pad token, where a folder names none.
END_TEXT = "<|endoftext|>"


class ClipTokens:
    """Lower-cases, splits and numbers texts as tokenizer.json says, start and end token included."""

    def __init__(self, tokenizer: Tokenizer, pad: int) -> None:
        """`tokenizer` cuts by itself; `pad` stands behind shorter texts."""
        self._tokenizer, self._pad = tokenizer, pad

    def encode(self, texts: Sequence[str]) -> Feed:
        """input_ids and attention_mask int64 ``[texts, length]``, padded on the right to the longest.

        Raises `InputRefused` for no text.
        """
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        if not rows:
            raise InputRefused("no text was given; expected at least one")
        ids = np.full((len(rows), max(map(len, rows))), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}


def read_clip_tokens(folder: Path, spec: ClipText) -> ClipTokens:
    """The tokenizer of a model folder, for texts of at most the model's positions.

    Raises `InputRefused` when the folder's pad token is none of its tokens, or tokens and model
    disagree: more tokens than rows in the embedding, or texts that do not end where the model looks.
    """
    tokenizer, path = read_tokenizer(folder), folder / "tokenizer.json"
    named = special_tokens(folder) or read_optional(folder / "special_tokens_map.json")
    text = named.get("pad_token", END_TEXT)
    pad = tokenizer.token_to_id(str(text.get("content") if isinstance(text, dict) else text))
    if pad is None:
        raise InputRefused(f"{path}: the pad token {text!r} is none of its tokens")
    if tokenizer.get_vocab_size() > spec.vocab_size:
        raise InputRefused(
            f"{path}: {tokenizer.get_vocab_size()} tokens, config.json has a vocabulary of "
            f"{spec.vocab_size}; they belong to different models"
        )
    tokenizer.enable_truncation(spec.max_positions)
    _check_end(path, tokenizer, spec)
    return ClipTokens(tokenizer, pad)


def _check_end(path: Path, tokenizer: Tokenizer, spec: ClipText) -> None:
    """Raise `InputRefused` unless a text's last token is the one whose state the model takes."""
    empty, ids = (list(tokenizer.encode(text).ids) for text in ("", "a photo"))
    taken = max(ids, default=None) if spec.end is None else spec.end
    if not (empty and empty[-1] == taken and ids.index(taken) == len(ids) - 1):
        wanted = (
            "the highest of all" if spec.end is None else f"{spec.end}, config.json's eos_token_id"
        )
        raise InputRefused(
            f"{path}: a text becomes {ids[:8]}; expected its last token, and only that, to be {wanted}"
        )
