"""Text encoders: sentence vectors, the scores of a classification head, entities of a token head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exporter.core.errors import InputRefused, WrongUsage
from exporter.families.base import Feed
from exporter.families.tasks import ENCODER_GRAPH, Outputs, TextPreparer
from exporter.runtimes.graphs import Graphs

Float32 = NDArray[np.float32]
Head = Literal["none", "class", "token"]
BATCH = 8


@dataclass(frozen=True, order=True)
class EntitySpan:
    """An entity at ``text[start:end]``, in characters."""

    kind: str
    start: int
    end: int


class TextEncoder:
    """An encoder of texts with whatever head it has."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._preparer: TextPreparer = graphs.preparer
        self._head: Head | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the head's outputs; empty for an encoder without a head."""
        return self._preparer.labels

    @property
    def head(self) -> Head:
        """What the graph gives: hidden states, scores of a text, or scores of each token."""
        if self._head is None:
            logits = self._run(["text"])[1].get("logits")
            self._head = "none" if logits is None else "class" if logits.ndim == 2 else "token"
        return self._head

    def embed(self, texts: Sequence[str]) -> Float32:
        """Mean of the hidden states of each text's own tokens, ``[texts, hidden]`` (not normalised).

        Raises `WrongUsage` for a model with a head: its graph gives scores alone.
        """
        parts = []
        for feed, outputs in self._batches(texts, "last_hidden_state"):
            hidden, mask = outputs["last_hidden_state"], feed["attention_mask"][..., None]
            # Padding may hold anything, also what is not finite.
            sums = np.where(mask > 0, hidden, 0).sum(axis=1, dtype=np.float64)
            parts.append((sums / mask.sum(axis=1)).astype(np.float32))
        return np.concatenate(parts)

    def logits(self, texts: Sequence[str]) -> Float32:
        """Scores of the classification head, ``[texts, labels]``. Raises `WrongUsage` without one."""
        return np.concatenate([o["logits"] for _, o in self._batches(texts, "logits", 2)])

    def entities(self, text: str) -> tuple[EntitySpan, ...]:
        """Entities that the token head finds. Raises `WrongUsage` without one."""
        (_, outputs), *_ = self._batches([text], "logits", 3)
        best = outputs["logits"][0].argmax(axis=-1)
        tags = [self.labels[i] for i in best.tolist()]
        return decode_entities(text, self._preparer.tokens(text), tags)

    def _run(self, texts: Sequence[str]) -> tuple[Feed, Outputs]:
        feed = self._preparer.texts(texts)
        return feed, self._graphs.run(ENCODER_GRAPH, feed)

    def _batches(
        self, texts: Sequence[str], output: str, axes: int | None = None
    ) -> Iterator[tuple[Feed, Outputs]]:
        for start in range(0, len(texts), BATCH):
            feed, outputs = self._run(texts[start : start + BATCH])
            found = outputs.get(output)
            if found is None or (axes is not None and found.ndim != axes):
                raise WrongUsage(
                    f"this encoder gives {', '.join(outputs)} of other shape; expected {output}"
                    + (f" with {axes} axes" if axes else ", as models without a head give it")
                )
            if not np.isfinite(found).all() and output == "logits":
                raise InputRefused("scores are not finite; the model overflowed or is damaged")
            yield feed, outputs


def decode_entities(
    text: str, tokens: Sequence[tuple[int, int]], tags: Sequence[str]
) -> tuple[EntitySpan, ...]:
    """Entities of `text` from one tag per token; (0, 0) marks special tokens.

    A word has the tag of its first piece, as in training, where later pieces are not labelled. Words
    are joined as seqeval's default mode joins them (CoNLL-2000): a word begins an entity where its
    tag is B-, or another type than the word before has; tags without B- or I- count as I-. Raises
    ValueError when tokens and tags differ in number.
    """
    spans: list[EntitySpan] = []
    before = ""
    for (start, end), tag in _words(text, list(zip(tokens, tags, strict=True))):
        prefix, dash, name = tag.partition("-")
        if not dash or prefix not in ("B", "I"):
            prefix, name = "I", tag
        if tag == "O":
            before = ""
            continue
        if before == name and prefix == "I":
            spans[-1] = EntitySpan(name, spans[-1].start, end)
        else:
            spans.append(EntitySpan(name, start, end))
        before = name
    return tuple(spans)


def _words(
    text: str, tokens: Sequence[tuple[tuple[int, int], str]]
) -> Iterator[tuple[tuple[int, int], str]]:
    """Tokens joined to words: pieces that touch and have letters or digits on both sides."""
    word: tuple[int, int] | None = None
    tag = "O"
    for (start, end), own in tokens:
        if start == end:
            continue
        if word and word[1] == start and text[start - 1].isalnum() and text[start].isalnum():
            word = (word[0], end)
            continue
        if word:
            yield word, tag
        word, tag = (start, end), own
    if word:
        yield word, tag
