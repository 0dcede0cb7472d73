"""ROUGE F-measures (Lin 2004), as the rouge-score package computes them without a stemmer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Lowercase runs of ASCII letters and digits; everything else separates."""
    return _WORD.findall(text.lower())


def rouge1(reference: str, prediction: str) -> float:
    """ROUGE-1 F of one pair, in 0..1. Two empty texts agree: 1."""
    return rouge_n(reference, prediction, 1)


def rouge_n(reference: str, prediction: str, n: int) -> float:
    """ROUGE-N F of one pair, in 0..1. Two texts without any word agree: 1."""
    truth, said = words(reference), words(prediction)
    if not truth and not said:
        return 1.0
    expected, found = _ngrams(truth, n), _ngrams(said, n)
    return _f_measure((expected & found).total(), found.total(), expected.total())


def rouge_l(reference: str, prediction: str) -> float:
    """ROUGE-L F of one pair (longest common subsequence of words), in 0..1. Two empty texts: 1."""
    truth, said = words(reference), words(prediction)
    if not truth and not said:
        return 1.0
    return _f_measure(len(_common(truth, said)), len(said), len(truth))


def rouge_l_sum(reference: str, prediction: str) -> float:
    """Summary-level ROUGE-L F (union of subsequences per reference sentence), in 0..1.

    One sentence per line in both texts, as for the rouge-score package's rougeLsum. Two empty texts: 1.
    """
    truth = [w for line in reference.split("\n") if (w := words(line))]
    said = [w for line in prediction.split("\n") if (w := words(line))]
    if not truth and not said:
        return 1.0
    # A word counts as often as both texts have it, however many sentences hit it.
    left_truth, left_said = (Counter(w for line in text for w in line) for text in (truth, said))
    hits = 0
    for line in truth:
        places = {place for other in said for place in _common(line, other)}
        for place in sorted(places):
            word = line[place]
            if left_truth[word] > 0 and left_said[word] > 0:
                hits += 1
                left_truth[word] -= 1
                left_said[word] -= 1
    return _f_measure(hits, sum(map(len, said)), sum(map(len, truth)))


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _common(truth: Sequence[str], said: Sequence[str]) -> list[int]:
    """Places in `truth` of a longest common subsequence; of several the one rouge-score takes."""
    table = [[0] * (len(said) + 1) for _ in range(len(truth) + 1)]
    for i, word in enumerate(truth, 1):
        row, above = table[i], table[i - 1]
        for j, other in enumerate(said, 1):
            row[j] = above[j - 1] + 1 if word == other else max(above[j], row[j - 1])
    places, i, j = [], len(truth), len(said)
    while i and j:
        if truth[i - 1] == said[j - 1]:
            places.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]


def _f_measure(overlap: int, said: int, truth: int) -> float:
    if overlap == 0:
        return 0.0
    # Precision and recall first and then their harmonic mean, so that the last bit agrees with
    # the package this is tested against.
    precision, recall = overlap / said, overlap / truth
    return 2 * precision * recall / (precision + recall)
