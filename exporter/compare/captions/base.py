"""What a caption metric gets and gives: pairs of texts in, additive counts per pair out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Combine = Callable[[Float64], Float64]


@dataclass(frozen=True)
class Pair:
    """A ground-truth caption, what was said of the same image, and the image where it is known."""

    id: str
    truth: str
    said: str
    image: Path | None = None


def ratio(sums: Float64) -> Float64:
    """First over second column of sums ``[..., 2]``; NaN where the second is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        out: Float64 = sums[..., 0] / sums[..., 1]
    return out


@dataclass(frozen=True)
class Tally:
    """One figure as counts ``[pairs, k]`` that add up over pairs.

    `combine` maps sums ``[..., k]`` to figures ``[...]``. A mean has the columns score and 1, BLEU its
    n-gram counts: so that any resample of the pairs is a sum and one call.
    """

    counts: Float64
    combine: Combine = ratio

    @property
    def value(self) -> float:
        """The figure over all pairs."""
        return float(self.combine(self.counts.sum(0)))


def mean_tally(scores: Sequence[float] | Float64) -> Tally:
    """The mean of one score per pair."""
    column = np.asarray(scores, dtype=np.float64)
    return Tally(np.stack([column, np.ones_like(column)], axis=1))


@dataclass(frozen=True)
class NotComputed:
    """Why a metric was not computed: what was looked for and what would bring it."""

    reason: str


class CaptionMetric(Protocol):
    """One metric, opened once (weights loaded) and used for the captions of every model."""

    @property
    def how(self) -> str:
        """One line: settings that change the number, such as layer, tokenizer, smoothing."""

    def score(self, pairs: Sequence[Pair]) -> Mapping[str, Tally] | NotComputed:
        """One or more figures by name, rows in the order of `pairs` (at least one)."""
