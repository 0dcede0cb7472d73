"""Texts of SigLIP: tokenizer.json as transformers' SiglipTokenizer uses its SentencePiece model."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from exporter.core.errors import InputRefused
from exporter.core.modelfiles import read_json
from exporter.families.base import Feed
from exporter.families.prompts.textfiles import read_optional, read_tokenizer, special_tokens
from exporter.families.specs.siglip import SiglipText

# SiglipTokenizer's own end token, which pads too, where a folder names no other.
END_TEXT = "</s>"
# SentencePiece's model of single tokens (arXiv 1804.10959), by the name that tokenizer.json has for it.
KIND = "Unigram"
SPACE = "▁"
PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonical_text(text: str, *, lower: bool = True) -> str:
    """`text` in lower case, without ASCII punctuation, with single spaces: what SigLIP was trained on.

    As big_vision's ``canonicalize_text``; not all published tokenizer.json do the whole of it.
    SentencePiece's own sign for a space counts as one.
    """
    bare = (text.lower() if lower else text).translate(PUNCTUATION).replace(SPACE, " ")
    return re.sub(r"\s+", " ", bare).strip()


@dataclass(frozen=True)
class SiglipTokens:
    """Texts as tokens of one length. `tokenizer` cuts by itself; `pad` fills the rest, end token and all.

    A special token that is written out in a text is read as text, its punctuation gone: transformers
    takes it for the token.
    """

    tokenizer: Tokenizer
    pad: int
    length: int
    lower: bool

    def encode(self, texts: Sequence[str]) -> Feed:
        """input_ids int64 ``[texts, length]``, padded on the right. Raises `InputRefused` for no text.

        There is no attention mask: the model sees padding, and was trained so.
        """
        if not texts:
            raise InputRefused("no text was given; expected at least one")
        plain = [canonical_text(text, lower=self.lower) for text in texts]
        ids = np.full((len(plain), self.length), self.pad, np.int64)
        for row, encoding in zip(ids, self.tokenizer.encode_batch(plain), strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return {"input_ids": ids}


def read_siglip_tokens(folder: Path, spec: SiglipText) -> SiglipTokens:
    """The tokenizer of a model folder, for texts of the model's length or the tokenizer's, if shorter.

    Raises `InputRefused` when the tokens are of another kind (SigLIP 2 has Gemma's), when the folder's pad
    token is none of them, when there are more than rows in the embedding, or when a text does not end
    with the end token.
    """
    tokenizer, path = read_tokenizer(folder), folder / "tokenizer.json"
    kind = (read_json(path).get("model") or {}).get("type")
    if kind != KIND:
        raise InputRefused(
            f"{path}: tokens are of the kind {kind!r}; expected {KIND}, as SigLIP's (SigLIP 2, which has "
            "Gemma's tokens, is not known)"
        )
    settings = read_optional(folder / "tokenizer_config.json")
    named = special_tokens(folder) or read_optional(folder / "special_tokens_map.json")
    end, pad = (_id(path, tokenizer, named, kind) for kind in ("eos_token", "pad_token"))
    if tokenizer.get_vocab_size() > spec.vocab_size:
        raise InputRefused(
            f"{path}: {tokenizer.get_vocab_size()} tokens, config.json has a vocabulary of "
            f"{spec.vocab_size}; they belong to different models"
        )
    ids = tokenizer.encode("a photo").ids
    if ids[-1:] != [end] or tokenizer.encode("").ids != [end]:
        raise InputRefused(
            f"{path}: a text becomes {ids[:8]}; expected SigLIP's tokens, of which the last is the end "
            f"token {end}, and nothing else around a text"
        )
    declared = settings.get("model_max_length")
    length = min(
        spec.max_positions, declared if type(declared) is int and declared > 1 else 1 << 30
    )
    tokenizer.enable_truncation(length)
    return SiglipTokens(tokenizer, pad, length, bool(settings.get("do_lower_case", True)))


def _id(path: Path, tokenizer: Tokenizer, named: Mapping[str, Any], kind: str) -> int:
    """The id of the special token `kind`. Raises `InputRefused` when the tokenizer has none."""
    text = named.get(kind, END_TEXT)
    found = tokenizer.token_to_id(str(text.get("content") if isinstance(text, dict) else text))
    if found is None:
        raise InputRefused(f"{path}: the {kind} {text!r} is none of its tokens")
    return int(found)
