"""Trust figures of classifiers, retrievers and taggers, as pure functions of scores and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 15


def calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal width (Guo et al. 2017), 0..1.

    `confidence` of each prediction in 0..1 and whether it was `correct`: the mean over predictions of
    |accuracy - mean confidence| of their bin. Bins are closed on the right, the first on both sides.
    Raises ValueError for no predictions, confidences outside 0..1 or lengths that differ.
    """
    scores, hits = _calibration_input(confidence, correct)
    edges = np.linspace(0.0, 1.0, bins + 1)
    return _binned_gap(scores, hits, np.digitize(scores, edges[1:-1], right=True), bins)


def adaptive_calibration_error(
    confidence: ArrayLike, correct: ArrayLike, bins: int = BINS
) -> float:
    """Expected calibration error with bins of equally many predictions (Nixon et al. 2019), 0..1.

    Sorted by confidence (stable) and cut as evenly as possible, the first bins one larger. With fewer
    predictions than bins each has a bin of its own. Raises as `calibration_error`.
    """
    scores, hits = _calibration_input(confidence, correct)
    place = np.empty(len(scores), dtype=np.int64)
    parts = np.array_split(np.argsort(scores, kind="stable"), min(bins, len(scores)))
    for number, part in enumerate(parts):
        place[part] = number
    return _binned_gap(scores, hits, place, len(parts))


def _calibration_input(
    confidence: ArrayLike, correct: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scores = np.asarray(confidence, dtype=np.float64)
    hits = np.asarray(correct, dtype=bool).astype(np.float64)
    if scores.ndim != 1 or scores.shape != hits.shape or not len(scores):
        raise ValueError(f"shapes {scores.shape} and {hits.shape}; expected two equal vectors")
    if not (np.all(scores >= 0) and np.all(scores <= 1)):
        raise ValueError("a confidence lies outside 0..1")
    return scores, hits


def _binned_gap(
    scores: NDArray[np.float64], hits: NDArray[np.float64], place: NDArray[np.int64], bins: int
) -> float:
    gaps = np.bincount(place, hits, bins) - np.bincount(place, scores, bins)
    return float(np.abs(gaps).sum() / len(scores))


def auroc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve: P(a positive scores higher than a negative), ties count half.

    By ranks (Mann-Whitney). Raises ValueError unless there are both positives and negatives and all
    scores are finite.
    """
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if values.ndim != 1 or values.shape != labels.shape or not np.all(np.isfinite(values)):
        raise ValueError("expected one finite score and one label per case")
    hits = int(labels.sum())
    misses = len(labels) - hits
    if not hits or not misses:
        raise ValueError(f"{hits} positives and {misses} negatives; expected some of both")
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    # The mean rank of a tie group whose last member has rank cumsum(counts).
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    return float((ranks[labels].sum() - hits * (hits + 1) / 2) / (hits * misses))


def recall_at_k(similarity: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Share of queries with a relevant item among the `k` most similar, 0..1.

    `similarity` and `relevant` are ``[queries, items]``. An item that ties with others counts by the
    share of orders of the tie in which a relevant one is within `k`, so that no order of the columns
    helps. Raises ValueError for a query without a relevant item, or k outside 1..items.
    """
    values, wanted = np.asarray(similarity, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if values.ndim != 2 or values.shape != wanted.shape or not wanted.size:
        raise ValueError(f"shapes {values.shape} and {wanted.shape}; expected two equal matrices")
    if not 1 <= k <= values.shape[1]:
        raise ValueError(f"k is {k}; expected 1 to {values.shape[1]}")
    if not wanted.any(1).all():
        raise ValueError("a query has no relevant item")
    return float(np.mean([_within(v, w, k) for v, w in zip(values, wanted, strict=True)]))


def _within(values: NDArray[np.float64], wanted: NDArray[np.bool_], k: int) -> float:
    best = float(values[wanted].max())
    above = int((values > best).sum())
    if above >= k:
        return 0.0
    tied = int((values == best).sum())
    good = int((wanted & (values == best)).sum())
    slots = min(k - above, tied)
    # 1 - P(all slots filled by the tied items that are not relevant), drawn without replacement.
    missed = 1.0
    for i in range(slots):
        missed *= max(tied - good - i, 0) / (tied - i)
    return 1.0 - missed


@dataclass(frozen=True)
class EntityScore:
    """Counts over all sequences: entities right, predicted, and in the ground truth."""

    right: int
    predicted: int
    truth: int

    @property
    def precision(self) -> float:
        """Right of predicted; 0 without any."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """Right of the ground truth's; 0 without any."""
        return self.right / self.truth if self.truth else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both (micro average); 0 without any entity."""
        whole = self.predicted + self.truth
        return 2 * self.right / whole if whole else 0.0


def entity_score(truth: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> EntityScore:
    """Entities of IOB2 tag sequences that agree in type and both ends: seqeval's strict mode.

    Raises ValueError when sequences differ in number or length, or a tag is not O, B-type or I-type.
    """
    if [len(t) for t in truth] != [len(s) for s in said]:
        raise ValueError("ground truth and prediction differ in the number of sequences or tags")
    expected, found = (
        {(i, *entity) for i, tags in enumerate(side) for entity in entities(tags)}
        for side in (truth, said)
    )
    return EntityScore(len(expected & found), len(found), len(expected))


def entities(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first, last) of the entities of one IOB2 sequence.

    Strictly: an entity begins at B- and goes on with I- of its own type; an I- without one before it is
    no entity.
    """
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix not in ("O", "B", "I") or (prefix == "O") != (tag == "O"):
            raise ValueError(f"tag {tag!r}; expected O, B-type or I-type")
        if kind and not (prefix == "I" and name == kind):
            yield kind, start, place - 1
            kind = ""
        if prefix == "B":
            kind, start = name, place
