"""Text to text, greedily: an encoder seen once, and a decoder token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from exporter.families.base import Feed
from exporter.families.tasks import SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER, Outputs, SummaryPreparer
from exporter.runtimes.base import Caption, Timing
from exporter.runtimes.graphs import Graphs

CROSS, PAST, PRESENT = "cross_key_values.", "past_key_values.", "present."


class Summariser:
    """Summaries with the graphs of one model. Not safe for use by several threads."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._preparer: SummaryPreparer = graphs.preparer

    def summarise(self, text: str, max_new_tokens: int) -> Caption:
        """Greedy answer to `text`, which begins with the task's own words where the model wants them.

        At most `max_new_tokens` tokens, fewer where the model's limit comes first; the caption's
        ``timing.vision`` is the encoder's. Raises `InputRefused` on a text that is too long,
        ValueError when `max_new_tokens` < 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        clock = [perf_counter()]
        inputs, settings = self._preparer.text(text), self._preparer.settings
        clock.append(perf_counter())
        decoder = _Decoder(self._graphs, inputs)
        clock.append(perf_counter())
        room = min(max_new_tokens, settings.max_positions)
        tokens: list[int] = []
        token = int(decoder.append([settings.start_id], 1)[-1].argmax())
        clock.append(perf_counter())
        while token not in settings.stop_ids:
            tokens.append(token)
            if len(tokens) == room:
                break
            token = int(decoder.append([token], 1)[-1].argmax())
            clock.append(perf_counter())
        prepare, encode, first, *later = np.diff(clock).tolist()
        return Caption(
            text=self._preparer.decode(tokens),
            tokens=tuple(tokens),
            stopped=token in settings.stop_ids,
            prompt_tokens=inputs["input_ids"].shape[1],
            timing=Timing(prepare, encode, first, tuple(later)),
        )

    def score(self, text: str, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits ``[len(tokens) + 1, vocab]`` behind `text`: row t predicts ``tokens[t]``.

        The last row predicts what follows them (the end token, as a rule). Raises `InputRefused` on a
        text that is too long.
        """
        decoder = _Decoder(self._graphs, self._preparer.text(text))
        return decoder.append([self._preparer.settings.start_id, *tokens], 0)


class _Decoder:
    """A text being written behind an encoded one."""

    def __init__(self, graphs: Graphs, inputs: Feed) -> None:
        self._graphs = graphs
        self._cross = graphs.run(SEQ2SEQ_ENCODER, inputs)
        self._mask = inputs["attention_mask"]
        # The cache has the shape of the cross keys and values, and no rows yet.
        self._past: Mapping[str, NDArray[np.float32]] = {
            name.replace(CROSS, PAST): np.zeros((*part.shape[:2], 0, part.shape[3]), np.float32)
            for name, part in self._cross.items()
        }

    def append(self, tokens: Sequence[int], keep: int) -> NDArray[np.float32]:
        """Logits ``[keep, vocab]`` behind the last `keep` of `tokens` (0: all)."""
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "encoder_attention_mask": self._mask,
            "num_logits_to_keep": np.array(keep, np.int64),
            **self._cross,
            **self._past,
        }
        found: Outputs = self._graphs.run(SEQ2SEQ_DECODER, feed)
        self._past = {
            name.replace(PRESENT, PAST): part
            for name, part in found.items()
            if name.startswith(PRESENT)
        }
        logits: NDArray[np.float32] = found["logits"][0]
        return logits
