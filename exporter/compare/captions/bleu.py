"""BLEU (Papineni et al. 2002) as sacrebleu computes it: tokenizer 13a, smoothing exp, mixed case."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from exporter.compare.captions.base import Float64, Pair, Tally, mean_tally

ORDER = 4
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_RULES = (
    # Every ASCII punctuation mark but ' , - . is a token of its own.
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    # Period and comma too, but not between digits.
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokens_13a(text: str) -> list[str]:
    """The tokens of mteval-v13a: language-independent clean-up, then `_RULES` in order."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in _ENTITIES:
        line = line.replace(entity, sign)
    line = f" {line} "
    for rule, spaced in _RULES:
        line = rule.sub(spaced, line)
    return line.split()


def bleu_counts(truth: str, said: str) -> list[float]:
    """Clipped matches of orders 1-4, n-grams of orders 1-4, tokens said, tokens of the truth."""
    reference, own = tokens_13a(truth), tokens_13a(said)
    matches, totals = [], []
    for n in range(1, ORDER + 1):
        mine, theirs = _ngrams(own, n), _ngrams(reference, n)
        matches.append(float((mine & theirs).total()))
        totals.append(float(mine.total()))
    return [*matches, *totals, float(len(own)), float(len(reference))]


def _ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def bleu(sums: Float64, order: int = ORDER, *, effective_order: bool = False) -> Float64:
    """BLEU-`order` in 0..100 of counts ``[..., 10]`` as `bleu_counts` gives them.

    Smoothing exp: the k-th order without a match has the precision 1 / (2^k n-grams). With
    `effective_order` (sentence BLEU) orders without any n-gram are left out; without it they make the
    corpus BLEU 0, and so does no match of any order.
    """
    matches, totals = sums[..., :order], sums[..., ORDER : ORDER + order]
    said, truth = sums[..., -2], sums[..., -1]
    possible = np.cumprod(totals > 0, axis=-1).astype(bool)
    empty = np.cumsum((matches == 0) & possible, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matches > 0, matches, 2.0**-empty) / totals
        logs = np.where(possible, np.log(precision), 0.0).sum(-1)
        used = possible.sum(-1) if effective_order else np.where(possible.all(-1), order, np.nan)
        penalty = np.where(said < truth, np.exp(1 - truth / said), 1.0)
        score = 100 * penalty * np.exp(logs / used)
    found = (matches > 0).any(-1)
    out: Float64 = np.where(found & ~np.isnan(score), score, 0.0)
    return out


class Bleu:
    """`CaptionMetric`: corpus BLEU-1..4 and the mean of sentence BLEU-1..4, all in 0..100."""

    how = "13a tokens, mixed case, smoothing exp, one reference; sentence BLEU by effective order"

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally]:
        """Figures bleu1..bleu4 (corpus) and sentence_bleu1..sentence_bleu4."""
        counts = np.array([bleu_counts(p.truth, p.said) for p in pairs])
        found: dict[str, Tally] = {}
        for order in range(1, ORDER + 1):
            found[f"bleu{order}"] = Tally(counts, partial(bleu, order=order))
        for order in range(1, ORDER + 1):
            found[f"sentence_bleu{order}"] = mean_tally(bleu(counts, order, effective_order=True))
        return found
