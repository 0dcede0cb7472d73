"""How far one next-token distribution is from another, token by token.

Teacher-forced: both models read the reference's own greedy tokens after the same image and prompt,
so that row t of both logit matrices predicts the same token from the same history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np
from numpy.typing import NDArray

from exporter.compare.statistics import clustered_mean

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """Per scored token of one case, arrays ``[tokens]``.

    kl: KL(reference || candidate) in nats; agree: equal top-1 token; reference_logprob and
    candidate_logprob: log probability of the reference's own next token (rows that have one).
    """

    kl: Float64
    agree: NDArray[np.bool_]
    reference_logprob: Float64
    candidate_logprob: Float64


@dataclass(frozen=True)
class Distribution:
    """Summary over all scored tokens; KL in nats, its standard error clustered by image.

    `first_divergent` is the median position of the first different token among the captions that
    differ at all (None when none does), `identical` the number of captions with equal tokens.
    """

    images: int
    tokens: int
    kl_mean: float
    kl_standard_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_ratio: float
    captions: int
    identical: int
    first_divergent: float | None


def log_softmax(logits: NDArray[np.floating]) -> Float64:
    """Log softmax over the last axis in float64. Raises ValueError on a row that is not finite."""
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("logits are not finite; the model overflowed or its weights are damaged")
    x -= x.max(axis=-1, keepdims=True)
    result: Float64 = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def compare_logits(
    reference: NDArray[np.floating], candidate: NDArray[np.floating], tokens: Sequence[int]
) -> TokenScores:
    """Compare logits ``[len(tokens) + 1, vocab]`` of the same history.

    Raises ValueError when the shapes differ or a value is not finite.
    """
    if reference.shape != candidate.shape or reference.shape[0] != len(tokens) + 1:
        raise ValueError(
            f"logits of shape {candidate.shape} against {reference.shape} for {len(tokens)} tokens"
        )
    p, q = log_softmax(reference), log_softmax(candidate)
    # sum p (log p - log q) loses digits where the two are nearly equal; adding sum(q - p) = 0
    # term by term keeps each term >= 0: e^p * (d + expm1(-d)), d = log p - log q. Far apart,
    # where expm1 would overflow, the plain form has all its digits.
    d = p - q
    near = np.exp(p) * (d + np.expm1(np.minimum(-d, 1.0)))
    far = np.exp(p) * d + (np.exp(q) - np.exp(p))
    kl = np.where(np.abs(d) < 1, near, far).sum(axis=-1)
    rows = np.arange(len(tokens))
    chosen = np.asarray(tokens, dtype=np.int64)
    return TokenScores(
        kl=np.maximum(kl, 0.0),
        agree=p.argmax(axis=-1) == q.argmax(axis=-1),
        reference_logprob=p[rows, chosen],
        candidate_logprob=q[rows, chosen],
    )


def first_difference(reference: Sequence[int], candidate: Sequence[int]) -> int | None:
    """Index of the first token that differs (also where one ends earlier); None when equal."""
    for index, (a, b) in enumerate(zip(reference, candidate, strict=False)):
        if a != b:
            return index
    return None if len(reference) == len(candidate) else min(len(reference), len(candidate))


def summarize(
    scores: Sequence[TokenScores], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Distribution | None:
    """Summary of the scored cases and of the greedy (reference, candidate) token pairs.

    None when no token was scored.
    """
    if not scores:
        return None
    kl = np.concatenate([s.kl for s in scores])
    mean, error = clustered_mean([float(s.kl.sum()) for s in scores], [len(s.kl) for s in scores])
    reference = np.concatenate([s.reference_logprob for s in scores])
    candidate = np.concatenate([s.candidate_logprob for s in scores])
    different = [first_difference(a, b) for a, b in pairs]
    places = [d for d in different if d is not None]
    return Distribution(
        images=len(scores),
        tokens=len(kl),
        kl_mean=mean,
        kl_standard_error=error,
        kl_median=float(np.median(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate([s.agree for s in scores]).mean()),
        perplexity_ratio=exp(float((reference - candidate).mean())) if len(reference) else 1.0,
        captions=len(pairs),
        identical=len(pairs) - len(places),
        first_divergent=float(np.median(places)) if places else None,
    )
