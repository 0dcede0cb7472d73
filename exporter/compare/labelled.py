"""Predictions with labels instead of captions: classes, retrieved items or entity tags."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import msgspec
import numpy as np

from exporter.compare.captions.base import Tally, mean_tally
from exporter.compare.captions.resample import intervals
from exporter.compare.quality.trust import (
    adaptive_calibration_error,
    auroc,
    calibration_error,
    entity_score,
)
from exporter.compare.records import Figure
from exporter.core.errors import InputRefused

LABEL_SCHEMA = 1
MAX_LINE = 1 << 20
TOP = (1, 5, 10)
KINDS = "probabilities and labels, or ranked and relevant, or tags and true_tags"


class Labelled(msgspec.Struct, frozen=True):
    """One line: an id and one of three pairs of keys; further keys are ignored.

    `probabilities` by class and the true `labels`; item ids `ranked` from best to worst and the
    `relevant` ones; IOB2 `tags` and `true_tags`.
    """

    id: str
    patient: str | None = None
    probabilities: dict[str, float] | None = None
    labels: list[str] | None = None
    ranked: list[str] | None = None
    relevant: list[str] | None = None
    tags: list[str] | None = None
    true_tags: list[str] | None = None


class LabelScores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures by name; calibration error and AUROC are no sums over cases and have no interval."""

    schema: int
    cases: int
    patients: int
    figures: dict[str, Figure]
    not_computed: dict[str, str]


def is_labelled(path: Path) -> bool:
    """Whether the first line has a key of `Labelled` beside the id, and no caption."""
    try:
        with path.open("rb") as lines:
            first = next((line for line in lines if line.strip()), b"")
        keys = msgspec.json.decode(first[:MAX_LINE], type=dict[str, msgspec.Raw]).keys()
    except (OSError, msgspec.MsgspecError, RecursionError):
        return False
    return "caption" not in keys and bool(keys & {"probabilities", "ranked", "tags"})


def read_labelled(path: Path) -> list[Labelled]:
    """Read JSON lines. Raises `InputRefused` with the line that is wrong."""
    found: dict[str, Labelled] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            read = msgspec.json.decode(line, type=Labelled)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise InputRefused(f"{path}, line {number}: {error}; expected {KINDS}") from error
        if read.id in found:
            raise InputRefused(f"{path}, line {number}: id '{read.id}' stands there twice")
        found[read.id] = read
    return list(found.values())


def score_labelled(lines: Sequence[Labelled]) -> LabelScores:
    """Calibration error and AUROC of classes, recall among the first k, F1 of entities.

    All lines must be of one kind. Raises `InputRefused` otherwise, or for values that make no sense.
    """
    patients = [line.patient or line.id for line in lines]
    lost: dict[str, str] = {}
    tallies: dict[str, Tally] = {}
    plain: dict[str, float] = {}
    try:
        if all(line.probabilities is not None and line.labels is not None for line in lines):
            plain, lost = _classes(lines)
            tallies = {"accuracy": mean_tally([float(_best(x) in (x.labels or ())) for x in lines])}
        elif all(line.ranked is not None and line.relevant for line in lines):
            tallies = {f"recall_at_{k}": _recall(lines, k) for k in TOP}
        elif all(line.tags is not None and line.true_tags is not None for line in lines):
            tallies = _entities(lines)
        else:
            raise InputRefused(f"the lines are not all of one kind; expected each to have {KINDS}")
    except ValueError as error:
        raise InputRefused(f"labels cannot be scored: {error}") from error
    groups = len(set(patients))
    figures = {name: Figure(v, None, None, len(lines), groups) for name, v in plain.items()}
    for name, i in intervals(tallies, patients).items():
        low, high = (bound if isfinite(bound) else None for bound in (i.low, i.high))
        figures[name] = Figure(i.value, low, high, len(lines), groups)
    return LabelScores(LABEL_SCHEMA, len(lines), groups, figures, lost)


def _best(line: Labelled) -> str:
    probabilities = line.probabilities or {}
    if not probabilities:
        raise ValueError(f"'{line.id}' has no class")
    return max(probabilities, key=lambda name: probabilities[name])


def _classes(lines: Sequence[Labelled]) -> tuple[dict[str, float], dict[str, str]]:
    """AUROC per class and its mean, calibration of the most likely class."""
    names = sorted({name for line in lines for name in line.probabilities or {}})
    odd = next((x.id for x in lines if sorted(x.probabilities or {}) != names), None)
    if odd is not None:
        raise ValueError(f"'{odd}' has other classes than the rest, expected {', '.join(names)}")
    found: dict[str, float] = {}
    lost: dict[str, str] = {}
    for name in names:
        positive = [name in (line.labels or ()) for line in lines]
        if all(positive) or not any(positive):
            lost[f"auroc {name}"] = "all cases are on one side; expected some with and some without"
            continue
        found[f"auroc {name}"] = auroc([(x.probabilities or {})[name] for x in lines], positive)
    if found:
        found["auroc_macro"] = float(np.mean(list(found.values())))
    confidence = [(line.probabilities or {})[_best(line)] for line in lines]
    right = [_best(line) in (line.labels or ()) for line in lines]
    found["ece"] = calibration_error(confidence, right)
    found["ece_adaptive"] = adaptive_calibration_error(confidence, right)
    return found, lost


def _recall(lines: Sequence[Labelled], k: int) -> Tally:
    hits = [bool(set((x.ranked or [])[:k]) & set(x.relevant or [])) for x in lines]
    return mean_tally(np.array(hits, dtype=np.float64))


def _entities(lines: Sequence[Labelled]) -> dict[str, Tally]:
    scores = [entity_score([x.true_tags or []], [x.tags or []]) for x in lines]
    right = [float(s.right) for s in scores]
    columns = {
        "entity_precision": (right, [float(s.predicted) for s in scores]),
        "entity_recall": (right, [float(s.truth) for s in scores]),
        "entity_f1": ([2 * r for r in right], [float(s.predicted + s.truth) for s in scores]),
    }
    return {n: Tally(np.array(c).T) for n, c in columns.items() if sum(c[1])}
