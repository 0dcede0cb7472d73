"""Texts to the inputs of a BERT: tokens, masks and kinds of token, with numpy and tokenizers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from exporter.core.errors import InputRefused
from exporter.families.base import Feed
from exporter.families.config import count
from exporter.families.prompts.textfiles import read_optional, read_tokenizer
from exporter.families.specs.bert import BertSpec

# What the tokenizer writes around one text: [CLS] and [SEP].
AROUND = 2


@dataclass(frozen=True)
class BertTexts:
    """A model folder's tokenizer as `families.tasks.TextPreparer` asks for it.

    `tokenizer` cuts long texts; `types`: whether the graph takes ``token_type_ids``.
    """

    tokenizer: Tokenizer
    pad_id: int
    types: bool
    labels: tuple[str, ...] = ()

    def texts(self, texts: Sequence[str]) -> Feed:
        """``input_ids``, ``attention_mask`` and, where asked for, ``token_type_ids``: int64
        ``[texts, length]``, padded on the right to the longest text. Raises `InputRefused` for no
        text.
        """
        encoded = [self._encode(text) for text in texts]
        if not encoded:
            raise InputRefused("no text was given; expected at least one")
        shape = (len(encoded), max(len(e.ids) for e in encoded))
        feed = {"input_ids": np.full(shape, self.pad_id, np.int64)}
        feed["attention_mask"] = np.zeros(shape, np.int64)
        if self.types:
            feed["token_type_ids"] = np.zeros(shape, np.int64)
        for row, one in enumerate(encoded):
            feed["input_ids"][row, : len(one.ids)] = one.ids
            feed["attention_mask"][row, : len(one.ids)] = 1
            if self.types:
                feed["token_type_ids"][row, : len(one.ids)] = one.type_ids
        return feed

    def tokens(self, text: str) -> tuple[tuple[int, int], ...]:
        """(begin, end) in characters of each token of `texts`; (0, 0) for special ones."""
        return tuple(self._encode(text).offsets)

    def _encode(self, text: str) -> Encoding:
        return self.tokenizer.encode(text)


def read_bert_texts(
    folder: Path,
    vocab_size: int,
    max_tokens: int,
    *,
    types: bool,
    pad_id: int = 0,
    labels: tuple[str, ...] = (),
) -> BertTexts:
    """Open the tokenizer of a model folder, which cuts texts at `max_tokens` or at its own limit.

    Raises `InputRefused` when there is no tokenizer.json, when it writes nothing around a text, or
    when it is of another model.
    """
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(folder)
    around = tokenizer.num_special_tokens_to_add(False)
    if around != AROUND:
        raise InputRefused(
            f"{path}: writes {around} tokens around a text; expected [CLS] and [SEP]: let transformers' "
            "AutoTokenizer save it again"
        )
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if last >= vocab_size or pad_id >= vocab_size:
        raise InputRefused(
            f"{path}: has token {max(last, pad_id)}, config.json a vocabulary of {vocab_size}; they belong "
            "to different models"
        )
    declared = read_optional(folder / "tokenizer_config.json").get("model_max_length")
    # Without a limit transformers writes an int of 31 digits.
    own = declared if type(declared) is int and declared > AROUND else max_tokens
    tokenizer.enable_truncation(min(max_tokens, own))
    return BertTexts(tokenizer, pad_id, types, labels)


def read_matched_texts(folder: Path, text: Mapping[str, Any], bert: BertSpec) -> BertTexts:
    """`read_bert_texts` for the text half of a model that matches: without kinds of token, cut at the
    ``context_length`` of its part `text` of config.json. Raises `InputRefused`.
    """
    length = count(text, "context_length", bert.max_positions, "text_config")
    return read_bert_texts(folder, bert.vocab_size, min(length, bert.max_positions), types=False)


def read_labels(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """Names of a head's `count` outputs by id2label, ``LABEL_0`` and so on without one.

    Raises `InputRefused` when it names other outputs.
    """
    named = config.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(count))
    return tuple(str(named[str(i)]) for i in range(count))


def label_count(config: Mapping[str, Any]) -> int:
    """Outputs of a classification head, by transformers' rules. Raises `InputRefused`."""
    named = config.get("id2label")
    if named is None:
        found = config.get("num_labels", 2)
        if type(found) is not int or found < 1:
            raise InputRefused(f"config.json: num_labels is {found!r}; expected a positive integer")
        return found
    if (
        not isinstance(named, Mapping)
        or set(named) != {str(i) for i in range(len(named))}
        or not named
    ):
        raise InputRefused(
            f"config.json: id2label is {str(named)[:100]!r}; expected names of the outputs 0, 1, ..."
        )
    return len(named)
