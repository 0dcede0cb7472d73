"""CheXbert F1 (Smit et al. 2020): micro and macro F1 of 14 and of 5 observations of a chest report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.compare.captions.base import Float64, Pair, Tally
from exporter.compare.captions.encoder import folder_tensors, open_encoder, require_torch
from exporter.core.errors import InputRefused

OBSERVATIONS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
    "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
# Classes of a head: 0 not mentioned, 1 present, 2 absent, 3 uncertain; the last head has 0 and 1 only.
STATED = (1, 3)


class CheXbert:
    """`CaptionMetric`: F1 of the observations that ground truth and caption state.

    Present and uncertain count as stated, absent and not mentioned do not. An observation that neither
    side ever states has F1 = 0 in the macro average, as published.
    """

    how = "present or uncertain counts as stated; macro average with 0 for what nobody states"

    def __init__(self, folder: Path) -> None:
        """Open the folder. Raises `InputRefused`, or `EnvironmentLacks` without torch."""
        require_torch()
        tensors = folder_tensors(folder)
        self._heads = []
        for i in range(len(OBSERVATIONS)):
            weight, bias = (tensors.get(f"linear_heads.{i}.{part}") for part in ("weight", "bias"))
            if weight is None or bias is None or weight.shape[0] != (4 if i < 13 else 2):
                raise InputRefused(
                    f"{folder}: no 'linear_heads.{i}.weight' of the expected shape; expected CheXbert's "
                    "checkpoint with its names (bert.*, linear_heads.*) as safetensors"
                )
            self._heads.append((weight, bias))
        body = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
        self._encoder = open_encoder(folder, body, pooler=False)

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures chexbert_micro14, chexbert_macro14, chexbert_micro5 and chexbert_macro5."""
        labels = self.labels([p.truth for p in pairs] + [p.said for p in pairs])
        return label_tallies(labels[: len(pairs)], labels[len(pairs) :])

    def labels(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which of `OBSERVATIONS` each text states, ``[texts, 14]``."""
        import torch

        rows = self._encoder.tokenize([" ".join(t.split()) for t in texts])
        found = np.zeros((len(texts), len(OBSERVATIONS)), dtype=bool)
        for places, inputs in self._encoder.batches(rows):
            with torch.inference_mode():
                first = self._encoder.model(**inputs).last_hidden_state[:, 0]
                for i, (weight, bias) in enumerate(self._heads):
                    classes = (first @ weight.T + bias).argmax(-1).numpy()
                    found[places, i] = np.isin(classes, STATED)
        return found


def label_tallies(truth: NDArray[np.bool_], said: NDArray[np.bool_]) -> dict[str, Tally]:
    """Micro and macro F1 over all observations and over `FIVE`, of labels ``[pairs, 14]``."""
    counts = np.stack([truth & said, ~truth & said, truth & ~said], -1).astype(np.float64)
    found = {}
    for size, names in ((14, OBSERVATIONS), (5, FIVE)):
        part = counts[:, [OBSERVATIONS.index(name) for name in names]].reshape(len(truth), -1)
        for average in ("micro", "macro"):
            combine = partial(f1_of_counts, macro=average == "macro")
            found[f"chexbert_{average}{size}"] = Tally(part, combine)
    return found


def f1_of_counts(sums: Float64, *, macro: bool) -> Float64:
    """F1 of sums ``[..., labels * 3]`` of true positives, false positives and false negatives.

    Nothing stated and nothing to state gives 0.
    """
    by_label = sums.reshape(*sums.shape[:-1], -1, 3)
    if not macro:
        by_label = by_label.sum(-2, keepdims=True)
    hits, extra, lost = (by_label[..., i] for i in range(3))
    whole = 2 * hits + extra + lost
    out: Float64 = np.where(whole > 0, 2 * hits / np.where(whole > 0, whole, 1), 0.0).mean(-1)
    return out
