"""ROUGE-1 F-measure (Lin 2004), as the rouge-score package computes it without a stemmer."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lowercase runs of ASCII letters and digits; everything else separates."""
    return _WORD.findall(text.lower())


def rouge1(reference: str, prediction: str) -> float:
    """ROUGE-1 F of one pair, in 0..1. Two empty texts agree: 1."""
    truth, said = Counter(words(reference)), Counter(words(prediction))
    if not truth and not said:
        return 1.0
    overlap = (truth & said).total()
    if overlap == 0:
        return 0.0
    # Precision and recall first and then their harmonic mean, so that the last bit agrees with
    # the package this is tested against.
    precision, recall = overlap / said.total(), overlap / truth.total()
    return 2 * precision * recall / (precision + recall)
