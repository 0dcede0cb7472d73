"""AlignScore (Zha et al. 2023), mode nli_sp, from a RoBERTa folder with its three-way head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from exporter.compare.captions.base import Pair, Tally, mean_tally
from exporter.compare.captions.encoder import folder_tensors, open_encoder, require_torch
from exporter.compare.captions.prepare import sentences
from exporter.core.errors import InputRefused

CHUNK_WORDS = 350
PREFIX = "base_model."
HEAD = ("tri_layer.weight", "tri_layer.bias")


class AlignScore:
    """`CaptionMetric`: how far the caption follows from the ground truth, 0..1.

    The ground truth (context) is cut into chunks of about 350 words at sentence ends; for each sentence
    of the caption (claim) the largest probability of "aligned" over the chunks is taken; the score is
    their mean. Two blank captions agree (1), one alone is 0.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises `InputRefused`, or `EnvironmentLacks` without torch."""
        require_torch()
        tensors = folder_tensors(folder)
        missing = [name for name in HEAD if name not in tensors]
        if missing or tensors[HEAD[0]].shape[0] != 3:
            raise InputRefused(
                f"{folder}: no three-way head {HEAD[0]}; expected AlignScore's checkpoint with its "
                "names (base_model.*, tri_layer.*) as safetensors"
            )
        self._weight, self._bias = (tensors[name] for name in HEAD)
        body = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        self._encoder = open_encoder(folder, body)
        self.how = "nli_sp, context chunks of 350 words, own sentence splitter instead of punkt"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figure alignscore."""
        inputs: list[tuple[str, str]] = []
        shapes: list[tuple[int, int]] = []
        for pair in pairs:
            chunks, claims = context_chunks(pair.truth), sentences(pair.said)
            usable = bool(pair.truth.strip()) and bool(claims)
            shapes.append((len(chunks), len(claims)) if usable else (0, 0))
            if usable:
                inputs += [(chunk, claim) for chunk in chunks for claim in claims]
        aligned = self._aligned(inputs)
        scores, start = [], 0
        for pair, (chunks_, claims_) in zip(pairs, shapes, strict=True):
            if not chunks_:
                scores.append(float(pair.truth.strip() == pair.said.strip()))
                continue
            block = aligned[start : start + chunks_ * claims_].reshape(chunks_, claims_)
            start += chunks_ * claims_
            scores.append(float(block.max(0).mean()))
        return {"alignscore": mean_tally(scores)}

    def _aligned(
        self, inputs: Sequence[tuple[str, str]]
    ) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        import torch

        found = np.zeros(len(inputs))
        rows = self._encoder.tokenize_context(inputs) if inputs else []
        for places, batch in self._encoder.batches(rows):
            with torch.inference_mode():
                pooled = self._encoder.model(**batch).pooler_output
                logits = pooled @ self._weight.T + self._bias
                found[places] = torch.softmax(logits, -1)[:, 0].numpy()
        return found


def context_chunks(text: str) -> list[str]:
    """The context in pieces of whole sentences, about 350 words each; at least one.

    As published: with k = words // 350 + 1, each piece has max(1, sentences // k) sentences.
    """
    parts = sentences(text) or [""]
    pieces = len(text.split()) // CHUNK_WORDS + 1
    size = max(len(parts) // pieces, 1)
    return [" ".join(parts[i : i + size]) for i in range(0, len(parts), size)]
