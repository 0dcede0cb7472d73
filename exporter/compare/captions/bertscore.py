"""BERTScore (Zhang et al. 2020) with idf weights, from a model folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from exporter.compare.captions.base import Float64, Pair, Tally, mean_tally
from exporter.compare.captions.encoder import open_encoder
from exporter.core.errors import InputRefused

# The layer that the bert-score package chose for the published model of this kind and depth. Its
# microsoft/deberta-xlarge-mnli has 48 layers and reads layer 40.
LAYERS = {
    ("bert", 12): 9,
    ("bert", 24): 18,
    ("deberta", 48): 40,
    ("distilbert", 6): 5,
    ("roberta", 12): 10,
    ("roberta", 24): 17,
}


class BertScore:
    """`CaptionMetric`: precision, recall and F1 of greedy cosine matches of contextual tokens.

    Weights are idf = log((N + 1) / (df + 1)) over the N ground-truth captions given, special tokens
    included, no rescaling. Two blank captions agree (1), one alone is 0. Where all tokens of a caption
    stand in every ground truth, its idf sum is 0 and they count equally (the package gives NaN).
    """

    def __init__(self, folder: Path, layer: int | None = None) -> None:
        """Open the folder; `layer` (1 is the first) defaults to `LAYERS`, else the last."""
        self._encoder = open_encoder(folder, pooler=False)
        config, model = self._encoder.config, self._encoder.model
        depth = int(config.get("num_hidden_layers") or config.get("n_layers") or 0)
        known = LAYERS.get((str(config["model_type"]), depth), depth)
        self.layer = known if layer is None else layer
        if not 1 <= self.layer <= depth:
            raise InputRefused(f"{folder}: layer {layer}; expected 1 to {depth}")
        # Layers above the one that is read are not computed.
        stack = model.transformer if config["model_type"] == "distilbert" else model.encoder
        stack.layer = stack.layer[: self.layer]
        self.how = (
            f"layer {self.layer} of {depth}, idf over the ground-truth captions, no rescaling"
        )

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures bertscore_precision, bertscore_recall and bertscore_f1."""
        texts = list(dict.fromkeys(t.strip() for p in pairs for t in (p.truth, p.said)))
        # RoBERTa's first word is read as one after a space: the package asks its tokenizer for that
        # (under transformers 5 the tokenizer no longer listens, and the package's numbers are others).
        space = " " if self._encoder.config["model_type"] == "roberta" else ""
        encoded = self._encoder.tokenize([f"{space}{t}" if t else t for t in texts])
        rows = dict(zip(texts, encoded, strict=True))
        idf = Idf([rows[p.truth.strip()].ids for p in pairs])
        vectors = self._embed(texts, rows)
        scores = np.zeros((len(pairs), 3))
        for i, pair in enumerate(pairs):
            truth, said = pair.truth.strip(), pair.said.strip()
            if not truth or not said:
                scores[i] = float(truth == said)
                continue
            weights = [idf.weights(rows[text].ids) for text in (truth, said)]
            scores[i] = greedy_match(vectors[truth], vectors[said], *weights)
        names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
        return {name: mean_tally(scores[:, i]) for i, name in enumerate(names)}

    def _embed(self, texts: Sequence[str], rows: Mapping[str, Any]) -> dict[str, Float64]:
        """Unit vectors ``[tokens, hidden]`` of each text."""
        import torch

        found: dict[str, Float64] = {}
        for places, inputs in self._encoder.batches([rows[t] for t in texts]):
            # The package gives no token types: all zero.
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                hidden = self._encoder.model(**inputs).last_hidden_state
            for place, row in zip(places, hidden, strict=True):
                own = row[: len(rows[texts[place]].ids)].numpy().astype(np.float64)
                found[texts[place]] = own / np.linalg.norm(own, axis=1, keepdims=True)
        return found


class Idf:
    """Inverse document frequency of token ids; a token in no document has df = 0."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._count = Counter(token for ids in documents for token in set(ids))
        self._documents = len(documents)

    def weights(self, ids: Sequence[int]) -> Float64:
        """log((N + 1) / (df + 1)) of each id, ``[len(ids)]``."""
        return np.array([log((self._documents + 1) / (self._count[i] + 1)) for i in ids])


def greedy_match(
    truth: Float64, said: Float64, truth_weights: Float64, said_weights: Float64
) -> tuple[float, float, float]:
    """Precision, recall and F1 of unit vectors ``[tokens, hidden]`` with a weight per token."""
    cosines = said @ truth.T
    precision = _weighted(cosines.max(1), said_weights)
    recall = _weighted(cosines.max(0), truth_weights)
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def _weighted(values: Float64, weights: Float64) -> float:
    whole = float(weights.sum())
    return float(values @ weights) / whole if whole else float(values.mean())
